"""The README's commands, files, equations and tags, against the code."""
import ast
import re
import shlex
import sys

import pytest
from conftest import ROOT

import hardconcrete
import hub
import igp
import kmeans
import router

README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}


def functions():
    """"file.name" -> the source of each top-level function."""
    return {f"{stem}.{node.name}": ast.get_source_segment(text, node)
            for stem, text in FILES.items() for node in ast.parse(text).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def equations(text):
    """Every equation number a text names: "Eq. 4-6" and "Eq. 9 and 10" count as all of them."""
    found = set()
    for first, joint, last in re.findall(r"Eq\. (\d+)(?:(-| and |, )(\d+))?", text):
        found |= set(range(int(first), int(last or first) + 1)) if joint == "-" else {
            int(first), int(last or first)}
    return found


def commands():
    """Every line of the README's shell blocks, without its comment."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


MAINS = {"igp.py": igp.main, "kmeans.py": kmeans.main, "hardconcrete.py": hardconcrete.main,
         "router.py": router.main}


def test_every_command_works(home, tmp_path, monkeypatch, capsys):
    """In the README's order, on the tiny models; .ci/run has what is about the environment."""
    monkeypatch.setattr(hub, "CACHE", home / "cache")
    monkeypatch.chdir(tmp_path)
    script, done = (ROOT / ".ci/run").read_text(encoding="utf-8"), []
    for command in commands():
        command = command.replace("--tasks-dir FOLDER", f"--tasks-dir {home / 'tasks'}")
        program, *words = shlex.split(command.replace("FOLDER", str(home / "model")))
        if "llama3-8b" in words:                                  # no hub here: parsed only
            args = igp.parse(words[1:])
            assert (args.preset, args.calibration) == ("paper", "fineweb-edu")
        elif program == "python" and words[0] in MAINS:
            if words[0] == "igp.py":
                words += ["--texts", "60", "--samples", "4", "--dtype", "float32"]
            monkeypatch.setattr(sys, "argv", words)
            assert not MAINS[words[0]](), command
        else:
            wanted = command.replace("pytest", "pytest -q").replace("install", "install --quiet")
            assert wanted in script or "whl/cpu" in command, command
        done.append(words[0] if words else program)
    out = capsys.readouterr().out
    assert {"igp.py", "kmeans.py", "hardconcrete.py", "router.py", "tests/fuzz.py", "tests/kill.py",
            "tests/bench.py", "pytest"} <= set(done)
    assert "| igp |" in out and "\nPurity " in out and "P(z = 0)" in out and "M^x skips" in out


def test_the_quick_start_stands_early_and_torch_is_the_pinned_one():
    assert "python igp.py" in "\n".join(README.splitlines()[:25])
    pin = re.search(r"torch==[\d.]+", (ROOT / "requirements.txt").read_text())[0]
    assert re.findall(r"torch==[\d.]+", README) == [pin]


def test_ci_runs_what_the_readme_says():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for command in ("-r requirements.txt", "python igp.py", "pytest -q --embedded", "ruff check",
                    "python kmeans.py", "python hardconcrete.py", "python router.py"):
        assert command in script


def test_the_flag_table_is_the_presets():
    rows = re.findall(r"^\| `--([\w-]+)` \| (\S+) \| (\S+) \| .*\|$", README, re.M)
    table = {flag.replace("-", "_"): values for flag, *values in rows}
    assert set(table) == set(igp.PRESETS["demo"]) == set(igp.PRESETS["paper"])
    for column, preset in enumerate(("demo", "paper")):
        args = igp.parse(["--preset", preset])
        assert {key: str(getattr(args, key)) for key in table} == {
            key: values[column] for key, values in table.items()}
    others = re.findall(r"`--(\w+) (\S+)`", README.split("Other defaults:")[1].split("(")[0])
    assert len(others) == 4
    for flag, value in others:
        assert str(igp.parser({}).get_default(flag)) == value


def tags(stem, text):
    """(place, tag) of every Silent: and Deviates: of a file; place is file.name, or the file."""
    lines, found, top = text.splitlines(), [], ast.parse(text).body
    for number, line in enumerate(lines, 1):
        for tag in re.findall(r"(Silent|Deviates):", line):
            inside = [x for x in top if x.lineno <= number <= x.end_lineno]
            after = [x for x in top if x.lineno > number]
            node = (inside or after)[0]                           # a comment is about what follows
            name = getattr(node, "name", None) or getattr(getattr(node, "targets", [None])[0],
                                                          "id", None)
            found.append((f"{stem}.{name}" if name else stem, tag))
    return found


def test_the_tag_table_is_the_code():
    rows = re.findall(r"^\| (`[^|]*) \| (Silent|Deviates) \| .+ \|$", README, re.M)
    table = {(place, tag) for places, tag in rows for place in re.findall(r"`([\w.]+)`", places)}
    assert table == {pair for stem, text in FILES.items() for pair in tags(stem, text)}
    assert tags("x", '"""Silent: a"""\n# Deviates: b\nC = 1\ndef f():\n    """Silent: d"""\n') == [
        ("x", "Silent"), ("x.C", "Deviates"), ("x.f", "Silent")]


def test_the_errata_name_code_and_tests_that_exist():
    rows = re.findall(r"^\| ([^|`]+) \| ([^|]+) \| ([^|]*)\|$", README.split("own slips")[1], re.M)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    places = [place for row in rows for place in re.findall(r"`([\w.]+)`", row[2])]
    assert len(places) > 10
    for place in places:
        stem, _, name = place.partition(".")
        assert re.search(rf"^[^#]*\b{name}\b", FILES[stem], re.M) if name else (
            f"def {stem}(" in tests), place


def test_the_papers_own_figures():
    dense, sleb = [40.40, 65.82, 68.42, 75.13, 53.75, 53.75], [35.40, 56.19, 57.36, 72.85, 65.78,
                                                              39.84]  # Table 8, in its order
    assert sum(dense) / 6 == pytest.approx(59.55, abs=0.01) and dense[4] == dense[5] < sleb[4]
    assert 100 * (sum(sleb) / 6) / (sum(dense) / 6) == pytest.approx(91.64, abs=0.02)
    by_N = {4: 63.82, 8: 61.05, 16: 66.98}                        # Fig. 5's text, 12.5 %
    assert by_N[8] < by_N[4] < by_N[16]
    errata = README.split("own slips")[1].split("## Not")[0]      # the README prints these figures
    assert all(f"{x:.2f}" in errata for x in (dense[4], sleb[4], by_N[8], by_N[4]))


def test_the_file_table_is_the_files():
    rows = re.findall(r"^\| `(\w+)\.py` \|", README, re.M)
    assert sorted(rows) == sorted(FILES)


def test_the_equation_table_is_the_code():
    rows = re.findall(r"^\| (Eq\. [^|]+) \|[^|]*\| ([^|]+) \|$", README, re.M)
    source, covered = functions(), set()
    for numbers, places in rows:
        for place in re.findall(r"`([\w.]+)`", places):
            assert equations(numbers) <= equations(source[place]), (numbers, place)
        covered |= equations(numbers)
    assert covered == set(range(1, 11))


def test_every_public_function_has_a_docstring():
    for stem, text in FILES.items():
        for node in ast.walk(ast.parse(text)):
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            nested = getattr(node, "name", "") in ("forward", "unzip", "usable", "missing", "work",
                                                   "error", "padded")
            assert not public or nested or ast.get_docstring(node), f"{stem}.{node.name}"


def test_the_requirements_are_the_imports():
    wanted = {line.split("#")[0].strip() for line in open(ROOT / "requirements.txt")} - {""}
    names = {re.split(r"[<>=]", line)[0].replace("-", "_") for line in wanted} - {"pytest", "ruff"}
    used = {part.split(".")[0] for text in FILES.values()
            for part in re.findall(r"^\s*(?:import|from) ([\w.]+)", text, re.M)}
    brought = {"huggingface_hub", "transformers"}  # by sentence-transformers
    assert names <= used <= names | brought | set(FILES) | set(sys.stdlib_module_names)
