"""The embedded default text: documentation and comments, in prose, of Python's library and every installed package."""

import ast
import contextlib
import hashlib
import importlib.metadata
import inspect
import itertools
import logging
import os
import platform
import re
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .workers import available_workers, worker_pool

logger = logging.getLogger(__name__)

RULES_VERSION = 4  # raise it whenever the rules below change what comes out
MIN_WORDS = 4
MIN_LETTER_SHARE = 0.78
FILES_PER_TASK = 64
# Of Python's own library: other people's packages, which are read by their distributions, and what no user reads.
NOT_OF_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
HELP_NAMES = ("help", "description")

PROSE_SECTIONS = {"notes", "note", "description", "introduction", "overview", "background", "details", "warnings"}
SECTION = re.compile(
    r"(?:args?|arguments?|parameters?|params?|keyword args?|keyword arguments|other parameters|attributes?|returns?|"
    r"yields?|raises|warns|examples?|see also|references?|methods|members|usage|inputs?|outputs?|shape|signature|"
    r"notes?|warnings?|todo|description|introduction|overview|background|details)\s*:?\s*",
    re.IGNORECASE,
)
# Of these the descriptions are kept where they are sentences, without the names and types they belong to.
DESCRIBED_SECTION = re.compile(
    r"(?:args?|arguments?|(?:other |keyword )?parameters?|params?|keyword arg(?:ument)?s?|attributes?|returns?|yields?|"
    r"raises|warns)",
    re.IGNORECASE,
)
# `name (type): description`, as in Google's style.
NAMED_ITEM = re.compile(r"[\w*`.,/ ]{1,60}(?:\s*\([^)]*\))?\s*:\s+(?=[A-Z]\S* \S)")
COMMENT = re.compile(r"\s*#:?\s+(\S.*?)\s*")
UNDERLINE = re.compile(r"[=\-~^\"'#*+.]{3,}\s*")
FIELD = re.compile(r"\s*(?::[\w\s*,.\[\]|]+:|@\w+|\.\. |\w[\w*, ]*\s*\([^)]*\)\s*:|[\w*`]+\s*:\s*(?:$|\S+, optional))")
ADMONITION = re.compile(r"\.\. (?:note|warning|tip|important|attention|caution|hint)::\s*(.*)")
ROLE = re.compile(r":[\w:+-]+:`~?!?([^`<]*?)(?:\s*<[^`>]*>)?`")
HYPERLINK = re.compile(r"`([^`<]+?)\s*<[^`>]+>`_*")
MARKDOWN_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
MARKUP = re.compile(r"(?<!\w)[*_`]+|[*_`]+(?!\w)")
URL = re.compile(r"https?://\S+|www\.\S+")
SPACES = re.compile(r"\s+")


def source_files(search_paths: Sequence[str] | None = None) -> list[tuple[str, Path]]:
    """
    (package, file) of every Python source file that an installed distribution lists, in a stable order; without
    `search_paths` those of Python's own library before them.
    """
    found: dict[Path, str] = {}
    for distribution in _distributions(search_paths):
        name = _name(distribution)
        for path in _source_paths(distribution):
            found.setdefault(path, name)
    listed = sorted(((name, path) for path, name in found.items()), key=lambda pair: (pair[0], pair[1].as_posix()))
    return [*(_library_files() if search_paths is None else ()), *listed]


def _library_files() -> list[tuple[str, Path]]:
    found: list[tuple[str, Path]] = []
    for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(set(folders) - NOT_OF_THE_LIBRARY)
        found += [("python", Path(folder, name)) for name in sorted(files) if name.endswith(".py")]
    return found


def _distributions(search_paths: Sequence[str] | None) -> list[importlib.metadata.Distribution]:
    paths = sys.path if search_paths is None else list(search_paths)
    by_name: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions(path=paths):
        # A checkout, which the path begins with or not by where a program was started.
        if search_paths is None and distribution.read_text("RECORD") is None:
            continue
        by_name.setdefault(_name(distribution), distribution)  # the first on the path is the one imported
    return [by_name[name] for name in sorted(by_name)]


def _name(distribution: importlib.metadata.Distribution) -> str:
    return re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "unknown").lower()


def fingerprint_installed(search_paths: Sequence[str] | None = None) -> str:
    """Hash of Python's version and of the names, versions and file lists (with hashes) of installed distributions."""
    digest = hashlib.blake2b(f"rules {RULES_VERSION}".encode(), digest_size=16)
    if search_paths is None:
        library = [f"{path.name} {path.stat().st_size}" for _, path in _library_files() if path.is_file()]
        digest.update("\n".join(["python", platform.python_version(), *library]).encode())
    for distribution in _distributions(search_paths):
        # A record names its own installer's files as well, in an order of the installer's.
        record = distribution.read_text("RECORD")
        lines = sorted(line for line in (record or "").splitlines() if ".py," in line)
        digest.update("\n".join([_name(distribution), distribution.version or "", *lines]).encode())
        if record is None:  # a checkout's egg-info lists its files without hashes
            for path in _source_paths(distribution):
                digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def _source_paths(distribution: importlib.metadata.Distribution) -> list[Path]:
    """The Python source files that a distribution lists, none outside its folder."""
    return [
        Path(str(distribution.locate_file(file)))
        for file in distribution.files or ()
        if file.suffix == ".py" and not file.is_absolute() and ".." not in file.parts
    ]


def read_installed_docs(
    search_paths: Sequence[str] | None = None, show_progress: bool = True, workers: int | None = None
) -> Iterator[str]:
    """
    A document a module: its prose paragraphs, one a line, each paragraph only where it stands first, whatever the number
    of `workers` (processes; default: one for each core).

    Source files are parsed, never imported; a file that does not parse or is not UTF-8 gives nothing.
    """
    files = source_files(search_paths)
    tasks = [files[start : start + FILES_PER_TASK] for start in range(0, len(files), FILES_PER_TASK)]
    seen: set[bytes] = set()
    workers = available_workers(workers)
    with (
        worker_pool(workers, "reads the installed documentation", "lower preprocessing_workers")
        if workers > 1
        else contextlib.nullcontext() as pool,
        tqdm(total=len(files), desc="reading documentation", unit="file", disable=not show_progress) as bar,
    ):
        read = map if pool is None else pool.map
        for task, results in zip(tasks, read(_paragraphs_of_files, tasks), strict=True):
            bar.update(len(task))
            for paragraphs in results:
                new = []
                for paragraph in paragraphs:
                    key = hashlib.blake2b(paragraph.lower().encode(), digest_size=12).digest()
                    if key not in seen:
                        seen.add(key)
                        new.append(paragraph)
                if new:
                    yield "\n".join(new)


def _paragraphs_of_files(files: Sequence[tuple[str, Path]]) -> list[list[str]]:
    return [module_paragraphs(path) for _, path in files]


def module_paragraphs(path: Path) -> list[str]:
    """Prose paragraphs of one source file: of its documentation strings in their order, then of its comments."""
    paragraphs: list[str] = []
    try:
        source = path.read_text(encoding="utf-8")
        if '"""' in source or "'''" in source:  # parsing is what takes the time
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                tree = ast.parse(source)
            for node in ast.walk(tree):
                for docstring in [*_docstrings(node), *_attribute_docstrings(node), *_help_texts(node)]:
                    paragraphs.extend(prose_paragraphs(docstring))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [*paragraphs, *comment_paragraphs(source)]


def comment_paragraphs(source: str) -> list[str]:
    """Comments of whole sentences over two lines or more: shorter ones are notes, and others are code put aside."""
    paragraphs: list[str] = []
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        comment = COMMENT.fullmatch(line)
        if comment is not None:
            block.append(comment[1])
            continue
        if len(block) > 1 and block[-1].endswith(".") and (text := _clean_prose(block)) is not None:
            paragraphs.append(text)
        block = []
    return paragraphs


def _docstrings(node: ast.AST) -> list[str]:
    """
    The documentation strings that stand at a node of a syntax tree: a definition's own, and those of compiled functions,
    which Python sources hand over in calls (`add_docstr(function, text)`) or keep under a name (`_doc = text`).
    """
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        return [docstring] if docstring else []
    if isinstance(node, ast.Call):
        named, values = node.func, node.args
    elif isinstance(node, ast.Assign):
        named, values = node.targets[0], [node.value]
    else:
        return []
    name = named.id if isinstance(named, ast.Name) else named.attr if isinstance(named, ast.Attribute) else ""
    if "doc" not in name.lower():
        return []
    return [text for value in values for part in ast.walk(value) for text in _text(part) if "\n" in text]


def _attribute_docstrings(node: ast.AST) -> list[str]:
    """The strings that stand behind assignments and document what is assigned."""
    if not isinstance(node, ast.Module | ast.ClassDef):
        return []
    return [
        text
        for before, statement in itertools.pairwise(node.body)
        if isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(statement, ast.Expr)
        for text in _text(statement.value)
    ]


def _help_texts(node: ast.AST) -> list[str]:
    """The texts for a user that a call or a mapping names `help` or `description`: of options, fields, columns."""
    named: list[tuple[Any, ast.AST]] = []
    if isinstance(node, ast.Call):
        named = [(keyword.arg, keyword.value) for keyword in node.keywords]
    elif isinstance(node, ast.Dict):
        named = [(getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True)]
    return [text for name, value in named if name in HELP_NAMES for text in _text(value)]


def _text(node: ast.AST) -> list[str]:
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def prose_paragraphs(docstring: str) -> list[str]:
    """
    The sentences of a documentation string: no doctests, tables, code, directives or headings, and of lists of
    parameters the descriptions alone.
    """
    paragraphs: list[str] = []
    in_list_section = in_described_section = in_fence = False
    for block in _blocks(docstring):
        if sum(line.strip().startswith(("```", "~~~")) for line in block) % 2:
            in_fence = not in_fence
            continue
        if in_fence:
            continue
        heading = block[0].strip()
        is_underlined = len(block) > 1 and UNDERLINE.fullmatch(block[1].strip()) is not None
        if SECTION.fullmatch(heading) and (is_underlined or heading.endswith(":")):
            title = heading.rstrip(": ").lower()
            in_list_section = title not in PROSE_SECTIONS
            in_described_section = DESCRIBED_SECTION.fullmatch(title) is not None
            block = block[2 if is_underlined else 1 :]
            if not in_list_section:
                block = [line.strip() for line in block]
        elif is_underlined:
            in_list_section = False
            block = block[2:]
        elif (admonition := ADMONITION.fullmatch(heading)) is not None:
            block = [line.strip() for line in (admonition[1], *block[1:]) if line]
        if in_list_section:
            candidates = _descriptions(block) if in_described_section else []
        elif block and block[0] == heading and heading.endswith("):") and FIELD.match(heading):
            candidates = _descriptions(block)  # `name (type):` without a section, as transformers has it
        else:
            # An indented block is code.
            candidates = [block] if block and not block[0].startswith((" ", "\t")) else []
        paragraphs.extend(text for lines in candidates if (text := _clean_prose(lines)) is not None)
    return paragraphs


def _descriptions(block: Sequence[str]) -> list[list[str]]:
    """
    The descriptions of a list of parameters or results, in the style of numpy (below `name : type`) or of Google (behind
    it, or without a name).
    """
    lines = textwrap.dedent("\n".join(block)).splitlines()
    descriptions: list[list[str]] = []
    for line in lines:
        if not line.startswith((" ", "\t")):
            head = NAMED_ITEM.match(line)
            if head is None and descriptions and descriptions[-1] and not descriptions[-1][-1].endswith((".", ":")):
                descriptions[-1].append(line)  # a sentence goes on
            elif head is None:
                descriptions.append([line] if line[:1].isupper() and " " in line else [])
            else:
                descriptions.append([line[head.end() :]])
        elif descriptions:
            descriptions[-1].append(line.strip())
    return [lines for lines in descriptions if lines]


def _blocks(docstring: str) -> Iterator[list[str]]:
    """Lines between blank lines; a section heading such as `Args:` starts a block of its own."""
    block: list[str] = []
    for line in [*inspect.cleandoc(docstring).splitlines(), ""]:
        starts_section = line.rstrip().endswith(":") and SECTION.fullmatch(line.rstrip()) is not None
        if block and (not line.strip() or starts_section):
            yield block
            block = []
        if line.strip():
            block.append(line)


def _clean_prose(lines: Sequence[str]) -> str | None:
    """One line of prose, or `None` where the lines are something else."""
    if any(line.lstrip().startswith((">>>", "...", "|", "+-", "==", "--", "$ ", "#!", "% ", "```")) for line in lines):
        return None
    # A role at the beginning of a line is no field, whether or not it goes on in the next one.
    text = ROLE.sub(r"\1", "\n".join(line.strip() for line in lines))
    if any(FIELD.match(line) for line in text.split("\n")):
        return None
    text = MARKDOWN_LINK.sub(r"\1", HYPERLINK.sub(r"\1", text.replace("\n", " ")))
    text = SPACES.sub(" ", MARKUP.sub("", URL.sub("", text))).strip(" -*#")
    if text.endswith("::"):
        text = text[:-1]
    words = text.split(" ")
    letters = sum(character.isalpha() or character == " " for character in text)
    if len(words) < MIN_WORDS or letters < MIN_LETTER_SHARE * len(text) or not text[0].isalpha():
        return None
    if not text.isprintable():  # halves of characters could not be written
        return None
    if text[-1] not in ".!?:;)\"'" or any(sign in text for sign in ("==", "->", "{", "}", "\\", " = ")):
        return None
    return text[0].upper() + text[1:]
