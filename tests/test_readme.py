"""The README's commands, files, equations and tags, against the code."""
import ast
import re
import sys

from conftest import ROOT

import igp

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
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def test_every_command_is_one_that_works():
    assert {"pip install -r requirements.txt", "python igp.py", "pytest"} <= set(commands())
    for command in commands():
        program, *words = command.split()
        if words[:1] == ["igp.py"]:
            assert igp.parse(words[1:]).model
        else:
            assert program in ("pip", "pytest", "python", "hf"), command


def test_ci_runs_what_the_readme_says():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for command in ("-r requirements.txt", "python igp.py", "pytest", "--embedded", "ruff check"):
        assert command in script


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
            nested = getattr(node, "name", "") in ("forward", "unzip", "usable", "clusters")
            assert not public or nested or ast.get_docstring(node), f"{stem}.{node.name}"


def test_the_requirements_are_the_imports():
    wanted = {line.split("#")[0].strip() for line in open(ROOT / "requirements.txt")} - {""}
    names = {re.split(r"[<>=]", line)[0].replace("-", "_") for line in wanted} - {"pytest", "ruff"}
    used = {part.split(".")[0] for text in FILES.values()
            for part in re.findall(r"^\s*(?:import|from) ([\w.]+)", text, re.M)}
    brought = {"huggingface_hub", "transformers"}  # by sentence-transformers
    assert names <= used <= names | brought | set(FILES) | set(sys.stdlib_module_names)
