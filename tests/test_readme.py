"""What README.md, docs/ and the docstrings tell people to type, and the files they point to, exist."""

import ast
import functools
import importlib
import re

import pytest

import common
from tests.helpers import ROOT, flags

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]
METHODS = [path.stem for path in ROOT.glob("*.py") if re.search(r"class Config\((RunConfig|Flags)\)", path.read_text())]
OTHERS = {"--fix-pred-lr", "--index-url", "--check"}  # of authors, pip and ruff; then of torchrun and of SLURM
OTHERS |= {"--nproc-per-node", "--nnodes", "--max-restarts", "--rdzv-backend", "--rdzv-id", "--rdzv-endpoint"}
OTHERS |= {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--signal"}
WRITTEN = {"classifier.txt", "similar.txt"}  # files that the scripts write


@functools.cache
def texts():
    pages = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
    return pages | {p.relative_to(ROOT).as_posix(): ast.get_docstring(ast.parse(p.read_text())) or "" for p in SCRIPTS}


def commands(text):
    """(file, arguments) of each `python FILE ...` or `python -m MODULE ...`: a line of a code block, without what
    explains it, or a span of code in a paragraph."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    blocks = re.findall(r"^ {4,}.+$", text, re.M) + "\n".join(fenced).split("\n")
    lines = [re.split(r"#| {3,}", line.strip().replace("$ ", "", 1))[0] for line in blocks]
    prose = re.sub(r"^(```.*?^```| {4,}.+?$)", "", text, flags=re.M | re.S)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    found = [re.search(r"(?:^|\s)python (-m )?(\S+)(.*)", line) for line in lines]
    found = [(m[2].replace(".", "/") + ".py" if m[1] and "." in m[2] else m[2], m[3]) for m in found if m]
    return [(file, re.sub(r'"[^"]*"|\.\.\.|&.*', "", rest).split()) for file, rest in found if file != "-c"]


@functools.cache
def flags_of(file):
    """The flags that a script takes."""
    if file.removesuffix(".py") in METHODS:
        names = [common.dashed(name) for name in flags(importlib.import_module(file.removesuffix(".py")).Config)]
        return {*names, *(name.replace("--", "--no-", 1) for name in names), "--preset", "--help"}
    source = (ROOT / file).read_text()
    if shared := re.search(r"^from benchmarks.*\btable\b", source, re.M):  # it takes those of its method, too
        source += (ROOT / "benchmarks/table.py").read_text()
    found = set(re.findall(r'"(--[a-z][\w-]*)"', source)) | {"--help"}
    return found.union(*map(flags_of, METHODS)) if shared else found


def test_there_is_something_to_check():
    asked = [command for text in texts().values() for command in commands(text)]
    assert len(METHODS) >= 5 and {"simclr.py", "linear_eval.py", "pytest"} <= {file for file, _ in asked}
    assert {"embed.py", "benchmarks/probes.py", "benchmarks/loss.py"} <= {file for file, _ in asked}
    assert {"--out", "--map", "--features", "--workers"} <= flags_of("embed.py")
    assert "--save" in flags_of("linear_eval.py") and "--protocol" in flags_of("linear_eval.py")
    assert "--seed" in flags_of("benchmarks/probes.py") and "--queue-size" in flags_of("moco.py")
    text = "a `python a.py\n--b 1` b\n\n    python -m d.c --d     e\n\n```bash\nx && python f.py --g  # --h\n```\n"
    assert sorted(commands(text)) == [("a.py", ["--b", "1"]), ("d/c.py", ["--d"]), ("f.py", ["--g"])]


@pytest.mark.parametrize("page", texts())
def test_what_to_type_exists(page):
    everywhere = OTHERS.union(*(flags_of(path.relative_to(ROOT).as_posix()) for path in SCRIPTS))
    for file, arguments in commands(texts()[page]):
        if file == "pytest" or re.match(r"[A-Z.]", file):  # METHOD.py, ...
            continue
        assert (ROOT / file).is_file(), f"{page}: python {file}"
        unknown = {word.split("=")[0] for word in arguments if word.startswith("--")} - flags_of(file)
        assert not unknown, f"{page}: python {file} {' '.join(arguments)}"
        if file.removesuffix(".py") in METHODS and "--help" not in arguments and "--resume" not in arguments:
            common.parse_args(importlib.import_module(file.removesuffix(".py")).Config, arguments)
    unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", texts()[page])) - everywhere
    assert not unknown, page


def test_the_python_section_runs():
    (code,) = re.findall(r"^## From Python\n.*?^```python\n(.*?)^```", texts()["README.md"], re.M | re.S)
    assert len(code.splitlines()) <= 18 and code.count("range(300)") == 1
    found, printed = {}, []
    exec(code.replace("range(300)", "range(3)").replace("10_000", "1_000"), found | {"print": printed.append})
    assert 0.1 < printed[0] < 0.8


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_named_files_are_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked.read_text()), f"{page.name} links to {target}"
    for name in re.findall(r"`([a-z][\w/]*\.(?:py|md|txt))`", text):
        there = name in WRITTEN or (ROOT / name).exists() or (page.parent / name).exists()
        assert there, f"{page.name} names {name}"
