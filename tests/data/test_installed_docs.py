"""The documentation of installed packages as text."""

import csv
import os
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_cram.data import installed_docs, sources
from hf_cram.data.errors import DataError
from hf_cram.data.installed_docs import (
    fingerprint_installed,
    module_paragraphs,
    prose_paragraphs,
    read_installed_docs,
    source_files,
)
from hf_cram.data.pipeline import DataArguments, prepare_corpus

DOCSTRING = """Compute the answer to a question that somebody asked.

    The answer is looked up in a :class:`~library.Table` with ``care``, and it
    is never wrong.

    Parameters
    ----------
    question : str
        The question to be answered by this function.

    Returns
    -------
    str
        The answer, which is usually short and to the point.

    Notes
    -----
    The method goes back to the last century and is slow.

    Examples
    --------
    The next line is an example of its use.

    >>> answer("why?")
    'because'
"""
GOOGLE = """Opens the door of the house with a key.

    .. note::
        The door must not be open already when this is called.

    ```python
    open_door(key)
    ```

    Args:
        key: The key that fits the lock of the door, or of the
            house, and goes on here.
        hand (`str`, *optional*): A second description. With two sentences.
        flag: bool

    Returns:
        Whether the door is open now, which may be
        a while after it was called.
    """


def test_prose_is_kept_and_the_rest_is_dropped():
    assert prose_paragraphs(DOCSTRING) == [
        "Compute the answer to a question that somebody asked.",
        "The answer is looked up in a library.Table with care, and it is never wrong.",
        "The question to be answered by this function.",
        "The answer, which is usually short and to the point.",
        "The method goes back to the last century and is slow.",
    ]
    assert prose_paragraphs(GOOGLE) == [
        "Opens the door of the house with a key.",
        "The door must not be open already when this is called.",
        "The key that fits the lock of the door, or of the house, and goes on here.",
        "A second description. With two sentences.",
        "Whether the door is open now, which may be a while after it was called.",
    ]
    assert prose_paragraphs("x = compute(y)  # no prose") == []
    assert prose_paragraphs("Short summary of what it does.\nArgs:\n    x: The first of the values to use.") == [
        "Short summary of what it does.",
        "The first of the values to use.",
    ]


UNUSUAL = """
:class:`Door` is the class of all doors and begins a line with its role, as does
:func:`open`, which is called with open() and gives nothing back.

.. note:: The key is turned twice
   before the door opens.

.. code:: The door is not opened by any code of this kind.

hinge (`str`, *optional*):
    The side of the door on which it hangs.
key (`Key`):
    The key that fits the lock of the door.
"""


def test_roles_calls_admonitions_and_descriptions_without_a_section():
    assert prose_paragraphs(UNUSUAL) == [
        "Door is the class of all doors and begins a line with its role, as does open, which is called with open() and "
        "gives nothing back.",
        "The key is turned twice before the door opens.",
        "The side of the door on which it hangs.",
        "The key that fits the lock of the door.",
    ]
    assert prose_paragraphs("The door \ud83d has half a character in its description.") == []
    assert prose_paragraphs("door (`str`): a thing\nx = door(key)") == []


ATTRIBUTES = '''
"""The documentation of the module comes first."""
limit = 3
"""The number of doors that may be open at a time."""

class House:
    doors: int = 2
    """The number of doors that the house was built with."""
    "x"

parser.add_argument("--doors", help="The number of doors that are painted.", type=int)
parser.add_argument("--keys", help=f"The number of {keys} that fit the lock of the door.")
columns = {"colour": {"description": "The colour of the door after it was painted.", "kind": "No text for a reader."}}
'''


def test_attributes_and_help_texts(tmp_path):
    (tmp_path / "module.py").write_text(ATTRIBUTES)
    assert sorted(module_paragraphs(tmp_path / "module.py")) == [
        "The colour of the door after it was painted.",
        "The documentation of the module comes first.",
        "The number of doors that are painted.",
        "The number of doors that may be open at a time.",
        "The number of doors that the house was built with.",
    ]


def test_a_checkout_is_no_installed_package(tmp_path, monkeypatch):
    """It is on the path or not by where a program was started: the text would be another one."""
    (tmp_path / "checkout" / "mine.egg-info").mkdir(parents=True)
    (tmp_path / "checkout" / "mine.egg-info" / "PKG-INFO").write_text("Name: mine\nVersion: 1.0\n")
    (tmp_path / "checkout" / "mine.egg-info" / "SOURCES.txt").write_text("mine.py\n")
    (tmp_path / "installed" / "mine-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "installed" / "mine-1.0.dist-info" / "METADATA").write_text("Name: mine\nVersion: 1.0\n")
    (tmp_path / "installed" / "mine-1.0.dist-info" / "RECORD").write_text("mine.py,,\n")
    for folder in ("installed", "checkout"):
        (tmp_path / folder / "mine.py").touch()
    path = [str(tmp_path / "installed")]
    monkeypatch.setattr(installed_docs, "sys", SimpleNamespace(path=path))  # all else that is installed takes seconds
    monkeypatch.setattr(installed_docs, "_library_files", list)
    before = fingerprint_installed()
    assert ("mine", tmp_path / "installed" / "mine.py") in source_files()
    path.insert(0, str(tmp_path / "checkout"))
    assert ("mine", tmp_path / "installed" / "mine.py") in source_files()
    assert fingerprint_installed() == before


def test_pythons_own_library_is_read_without_what_lies_in_it(tmp_path, monkeypatch):
    for name in ("argparse", "email/message", "test/test_email", "site-packages/other", "idlelib/run"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'"""The module {name} has documentation of its own."""')
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(installed_docs, "_distributions", lambda search_paths: [])
    assert source_files() == [("python", tmp_path / "argparse.py"), ("python", tmp_path / "email" / "message.py")]
    assert list(read_installed_docs(show_progress=False)) == [
        "The module argparse has documentation of its own.",
        "The module email/message has documentation of its own.",
    ]
    before = fingerprint_installed()
    assert fingerprint_installed() == before
    (tmp_path / "argparse.py").write_text("")
    assert fingerprint_installed() != before


COMPILED = """
import library

add_docstr(library.door, r'''
The door of the house, written in another language.

It has a second paragraph.
''')
_window_doc = '''
The window of the house has its text under a name.
'''
message = '''
A text of several lines that documents nothing.
'''
"""


def test_the_documentation_of_compiled_functions(tmp_path):
    (tmp_path / "module.py").write_text(COMPILED)
    assert module_paragraphs(tmp_path / "module.py") == [
        "The window of the house has its text under a name.",
        "The door of the house, written in another language.",
        "It has a second paragraph.",
    ]


COMMENTS = """
# Copyright of the house belongs
# to those who built it
#
# The door is painted before the house is sold, since nobody
# wants to wait for the colour to dry.
x = 1  # this stands beside code, and is no comment
#: The number of windows counts those that are
#: painted shut, too.
windows = 3
# One line is a note.
y = 2
# if door == "open":
#     close(door)
# return door.
def f():
    # A door that is left open lets the cold in, and what
    # that costs is told in the evening.
    return 0
"""


def test_comments_of_whole_sentences(tmp_path):
    """Behind the documentation strings; no notes, no code that was put aside, no headers without a sentence."""
    (tmp_path / "module.py").write_text(COMMENTS)
    expected = [
        "The door is painted before the house is sold, since nobody wants to wait for the colour to dry.",
        "The number of windows counts those that are painted shut, too.",
        "A door that is left open lets the cold in, and what that costs is told in the evening.",
    ]
    assert module_paragraphs(tmp_path / "module.py") == expected
    (tmp_path / "module.py").write_text('"""The house has a documentation string of its own."""\n' + COMMENTS)
    assert module_paragraphs(tmp_path / "module.py")[0] == "The house has a documentation string of its own."
    assert module_paragraphs(tmp_path / "module.py")[1:] == expected


@pytest.fixture
def site_packages(tmp_path):
    """Two distributions as an installer leaves them."""
    for name, modules in {
        "beta": {"beta/__init__.py": f'"""{DOCSTRING}"""\nraise SystemExit("executed")\n', "beta/broken.py": "def ("},
        "alpha": {
            "alpha/a.py": f'def f():\n    r"""{GOOGLE}"""\n',
            "alpha/latin.py": '"""Übergröße is not in UTF-8 here, and so it is skipped."""',
            "alpha/b.py": '"""Opens the door of the house with a key.\n\nOnly this paragraph is new in the module."""',
        },
    }.items():
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (tmp_path / name).mkdir()
        with open(info / "RECORD", "w", newline="") as stream:
            writer = csv.writer(stream)
            for path, content in modules.items():
                (tmp_path / path).write_bytes(content.encode("latin-1"))
                writer.writerow([path, "sha256=x", len(content)])
            writer.writerow([f"../../bin/{name}.py", "", ""])
    return tmp_path


def test_documents_of_packages_without_running_them(site_packages):
    search = [str(site_packages)]
    assert [name for name, _ in source_files(search)] == ["alpha"] * 3 + ["beta"] * 2
    documents = list(read_installed_docs(search, show_progress=False))
    assert documents == [
        "\n".join(prose_paragraphs(GOOGLE)),
        "Only this paragraph is new in the module.",  # the first paragraph stood before
        "\n".join(prose_paragraphs(DOCSTRING)),
    ]
    assert list(read_installed_docs(search, show_progress=False)) == documents


def test_fingerprint_follows_the_environment(site_packages):
    search = [str(site_packages)]
    before = fingerprint_installed(search)
    assert fingerprint_installed(search) == before
    record = site_packages / "beta-1.0.dist-info" / "RECORD"
    record.write_text(record.read_text().replace("sha256=x", "sha256=y"))
    assert fingerprint_installed(search) != before


def test_what_a_broken_removal_leaves_is_passed_over(site_packages):
    before = list(read_installed_docs([str(site_packages)], show_progress=False))
    (site_packages / "gone-1.0.dist-info").mkdir()
    assert fingerprint_installed([str(site_packages)])
    assert list(read_installed_docs([str(site_packages)], show_progress=False)) == before


def test_fingerprint_follows_the_sources_of_a_checkout(tmp_path):
    """Its egg-info lists files without hashes."""
    (tmp_path / "own.egg-info").mkdir()
    (tmp_path / "own.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (tmp_path / "own.egg-info" / "SOURCES.txt").write_text("own.py\n")
    (tmp_path / "own.py").write_text("# One\n")
    before = fingerprint_installed([str(tmp_path)])
    (tmp_path / "own.py").write_text("# Two\n")
    assert fingerprint_installed([str(tmp_path)]) != before


def test_default_text_is_extracted_once(tmp_path, monkeypatch):
    calls = []

    def documents(**_):
        calls.append(1)
        yield from (f"The sentence number {index} of the documentation is here." for index in range(300))

    monkeypatch.setattr(sources, "read_installed_docs", documents)
    monkeypatch.setattr(sources, "fingerprint_installed", lambda: "environment")
    settings = {"vocab_size": 200, "max_seq_length": 16, "eval_rows": 4, "cache_dir": str(tmp_path)}
    corpus = prepare_corpus(DataArguments(**settings))
    assert corpus.statistics["documents"] == 300
    assert not prepare_corpus(DataArguments(**{**settings, "max_seq_length": 32})).from_cache
    assert calls == [1]


@pytest.mark.slow
def test_this_environment_has_megabytes_of_prose():
    documents = list(read_installed_docs(show_progress=False))
    text = " ".join(documents)
    assert len(text) > 3e6
    assert sum(character.isalpha() or character.isspace() for character in text) / len(text) > 0.9
    paragraphs = [paragraph for document in documents for paragraph in document.split("\n")]
    assert len(set(paragraphs)) == len(paragraphs)


def die(_):
    os._exit(1)


def test_a_killed_worker_is_one_line(monkeypatch):
    monkeypatch.setattr(installed_docs, "_paragraphs_of_files", die)
    monkeypatch.setattr(installed_docs, "source_files", lambda _: [("package", Path("module.py"))])
    with pytest.raises(DataError, match="documentation was killed, .*: lower preprocessing_workers"):
        list(read_installed_docs(show_progress=False, workers=2))
