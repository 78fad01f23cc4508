"""README.md and docs/paper.md against the code: commands, flags, files, equations, tags."""
import ast
import re
import shlex
import sys

import torch
from conftest import ROOT

import baselines
import hardconcrete
import igp
import kmeans
import router
import run


def read(path):
    """The text of a file of the project."""
    return (ROOT / path).read_text(encoding="utf-8")


README, PAPER, CI = read("README.md"), read("docs/paper.md"), read(".ci/run")
FILES = {path.stem: read(path) for path in sorted(ROOT.glob("*.py"))}
TREES = {stem: ast.parse(text).body for stem, text in FILES.items()}
MAINS = {
    "igp.py": igp.main,
    "kmeans.py": kmeans.main,
    "hardconcrete.py": hardconcrete.main,
    "router.py": router.main,
}


def test_it_takes_five_minutes():
    assert len(README.splitlines()) <= 200
    start = README[:1500]
    assert "&& python igp.py\n" in start
    assert "&& pytest\n" in start
    [pin] = re.findall(r"torch==[\d.]+", read("requirements.txt"))
    assert set(re.findall(r"torch==[\d.]+", README + PAPER)) == {pin}


def test_every_command_works(home, tmp_path, monkeypatch, capsys):
    """In the README's order, on the tiny models; .ci/run has what is about the environment."""
    monkeypatch.setattr(torch, "__file__", str(home / "torch/__init__.py"))  # whose code is read
    monkeypatch.setattr(baselines, "OFFSPRING", 4)                # for speed
    monkeypatch.chdir(tmp_path)
    places = {
        "tasks-dir FOLDER": f"tasks-dir {home}/tasks",
        "FOLDER": f"{home}/model",
        "FILE": f"{home}/texts.jsonl",
    }
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    for command in re.split(r"\n|&&", "".join(blocks).strip()):
        command = command.split(" #")[0].strip()
        for name, place in places.items():
            command = command.replace(name, place)
        program, *words = shlex.split(command)
        if "llama3-8b" in words:                                  # no hub here: parsed only
            args = igp.parse(words[1:])
            assert (args.preset, args.calibration) == ("paper", "fineweb-edu")
        elif program == "python" and words[0] in MAINS:
            if words[0] == "igp.py":
                words += "--texts 40 --samples 4 --judged 9 --dtype float32".split()
            monkeypatch.setattr(sys, "argv", words)
            assert not MAINS[words[0]](), command
            assert words[0] in CI
        else:
            quiet = command.replace("pytest", "pytest -q").replace("install", "install --quiet")
            assert quiet in CI, command
    out = capsys.readouterr().out
    for part in ("| igp-mask-1 |", "| evopress |", "P(z = 0)", "k* = ", "Cluster "):
        assert part in out


def test_flags_and_their_defaults():
    flags = run.SETTINGS | run.FLAGS
    shown = set(re.findall(r"^\| `--([\w-]+)`", README, re.M))
    assert shown <= {flag.replace("_", "-") for flag in flags}
    for flag, (demo, paper, *_) in flags.items():
        name = "--" + flag.replace("_", "-")
        same = demo == paper and f"`{name} {demo}`" in README
        wanted = flag in run.SETTINGS or demo != paper and flag != "preset"
        assert same or not wanted or f"| `{name}` | {demo} | {paper} |" in README, name


def test_the_files_and_the_equations():
    assert sorted(re.findall(r"^\| `(\w+)\.py` \|", README, re.M)) == sorted(FILES)
    covered = set()
    for numbers, places in re.findall(r"^\| (Eq\. [^|]+) \|[^|]*\| ([^|]+) \|$", README, re.M):
        covered |= equations(numbers)
        for place in re.findall(r"`([\w.]+)`", places):
            stem, _, name = place.partition(".")
            [node] = [x for x in TREES[stem] if getattr(x, "name", "") == name]
            source = ast.get_source_segment(FILES[stem], node)
            assert equations(numbers) <= equations(source), (numbers, place)
    assert covered == set(range(1, 11))


def equations(text):
    """Every equation number a text names: "Eq. 4-6" and "Eq. 9 and 10" count as all of them."""
    found = set()
    for first, joint, last in re.findall(r"Eq\. (\d+)(?:(-| and |, )(\d+))?", text):
        ends = {int(first), int(last or first)}
        found |= set(range(min(ends), max(ends) + 1)) if joint == "-" else ends
    return found


def tags(stem):
    """(place, tag) of every Silent: and Deviates: of a file; place is file.name, or the file."""
    for number, line in enumerate(FILES[stem].splitlines(), 1):
        for tag in re.findall(r"(Silent|Deviates):", line):
            node = next(x for x in TREES[stem] if number <= x.end_lineno)  # or a comment's next
            target = getattr(node, "targets", [node])[0]
            name = getattr(target, "id", getattr(target, "name", None))
            yield f"{stem}.{name}" if name else stem, tag


def test_the_tag_table_is_the_code():
    table = set()
    for places, tag in re.findall(r"^\| (`[^|]*) \| (Silent|Deviates) \| .+ \|$", PAPER, re.M):
        table |= {(place, tag) for place in re.findall(r"`([\w.]+)`", places)}
    assert table == {pair for stem in FILES for pair in tags(stem)}


def test_no_figure_is_in_the_readme_alone():
    found = README.split("## What was found")[1].split("\n## ")[0]
    found = re.sub(r"^\d\. ", "", found, flags=re.M)              # the list's own numbers
    numbers = re.compile(r"\d+(?:\.\d+)?")
    results = read("docs/results.md")
    assert set(numbers.findall(found)) <= set(numbers.findall(results))
    [demo] = re.findall(r"```\n(\| method .*?)\n```", README, re.S)
    assert demo in results                                        # what the page's run printed
    [minutes] = re.findall(r" took ([\d.]+ minutes)", README)
    assert f"`python igp.py`, {minutes}" in results


def test_the_errata_name_code_and_tests_that_exist():
    errata = PAPER.split("own slips")[1]
    tests = "".join(map(read, (ROOT / "tests").glob("test_*.py")))
    places = re.findall(r"`([\w.]+)`", errata)
    for place in places:
        stem, _, name = place.partition(".")
        wanted = rf"^[^#]*\b{name}\b" if name else rf"def {stem}\("
        assert re.search(wanted, FILES[stem] if name else tests, re.M), place


def test_every_public_function_has_a_docstring():
    for stem, body in TREES.items():
        classes = [x.body for x in body if isinstance(x, ast.ClassDef)]
        for node in sum(classes, body):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                assert ast.get_docstring(node), f"{stem}.{node.name}"


def test_the_requirements_are_the_imports():
    names = set(re.findall(r"^[\w-]+", read("requirements.txt").replace("-", "_"), re.M))
    names -= {"pytest", "ruff", "matplotlib", "gguf"}             # transformers imports gguf
    used = re.findall(r"^\s*(?:import|from) (\w+)", "\n".join(FILES.values()), re.M)
    assert names == set(used) - set(FILES) - sys.stdlib_module_names


def test_no_file_names_a_place_that_readers_do_not_have():
    paths = [x for x in ROOT.rglob("*.*") if x.suffix in (".py", ".md") and ".venv" not in x.parts]
    for path in paths:
        assert not re.search(r"[\s`\"(]/(work|tmp|root)\b|\.\./shared", read(path)), path
