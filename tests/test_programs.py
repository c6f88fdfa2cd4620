"""What the programs of the package have in common."""

import argparse
import runpy

import pytest

from hf_cram.recipes import RecipeParser


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # it was imported before
@pytest.mark.parametrize("name", ["memory", "plan", "convert_cramming_checkpoint", "report"])
def test_ctrl_c_is_one_line(monkeypatch, capsys, name):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(RecipeParser, "parse", interrupt)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", interrupt)
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(f"hf_cram.{name}", run_name="__main__")
    assert caught.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert f"hf_cram.{name}: stopped" in line
