"""The documentation of installed packages as text."""

import csv

import pytest

from hf_cram.data import sources
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


def test_default_text_is_extracted_once(tmp_path, monkeypatch):
    calls = []

    def documents(show_progress=True):
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
