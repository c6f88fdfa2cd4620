"""The card says what a run was, programs can read it, and evaluations update it in place."""

import json

import pytest
import yaml
from conftest import REPOSITORY
from huggingface_hub import ModelCard, parse_eval_result_entries

from hf_cram.model_card import ModelCardError, build_model_card, save_model_card, update_model_card
from hf_cram.paper_results import GLUE_COLUMNS, HEADLINE_METRICS, PAPER_GLUE_ROWS

GOLDEN = REPOSITORY / "tests" / "data" / "model_card.md"
RESULTS = {
    "eval_loss": 3.912939, "eval_perplexity": 50.0458, "preprocessing_seconds": 0.1348, "skipped_steps": 2,
    "time_budget_seconds": 600.0, "tokens_per_second": 8897.6, "tokens_seen": 5339136, "train_seconds": 600.06,
}  # fmt: skip


def scores(*values):
    return {"median": sorted(values)[len(values) // 2], "values": list(values)}


PARTIAL_GLUE = {
    "tasks": {
        "cola": {"matthews_correlation": scores(10.0, 12.0, 11.0)},
        "stsb": {"pearson": scores(70.0, 71.5, 71.0), "spearmanr": scores(69.0, 70.0, 69.5)},
        "wnli": {"accuracy": scores(56.3, 56.3, 54.9)},
    },
    "average": 41.0,
    "columns": ["stsb", "cola"],
    "seeds": [1, 2, 3],
}
WHOLE_GLUE = {
    "tasks": {column: {HEADLINE_METRICS[column]: scores(60.0)} for column in GLUE_COLUMNS},
    "average": 60.0,
    "columns": list(GLUE_COLUMNS),
    "seeds": [1],
}
PAIRS = {
    "accuracy": 71.25,
    "pairs": 1200,
    "phenomena": {"anaphor_agreement": {"accuracy": 81.0, "pairs": 400}, "ellipsis": {"accuracy": 66.4, "pairs": 800}},
}


def build(**more):
    values = {
        "model_name": "quickstart",
        "results": RESULTS,
        "recipe": {"hidden_size": 256, "time_budget": "10m", "lr_scheduler_kwargs": {"warmup": 0.02}},
        "hardware": "1 x 2 CPU threads (x86_64)",
        "text_name": "installed-docs",
        "fills": [{"sentence": "He did not [MASK] what to say.", "fills": ["run", "|", "match"]}],
        "num_parameters": 4723840,
        "sequence_length": 128,
    }
    return build_model_card(**{**values, **more})


def metrics_of(card):
    return {
        (result.dataset_type, result.dataset_config, result.dataset_split, result.metric_type): result.metric_value
        for result in card.data.eval_results
    }


def rows_of(text):
    """Markdown tables as lists of cells, by the first cell."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells for cells in lines}


def test_card_is_the_recorded_one():
    card = build(glue_results=PARTIAL_GLUE, minimal_pairs=PAIRS)
    assert str(card) == GOLDEN.read_text(encoding="utf-8")


def test_front_matter_is_what_the_hub_reads(tmp_path):
    of_one = {"dataset_names": ["owner/text"], "held_out_of": "owner/text", "text_name": "owner/text"}
    save_model_card(build(**of_one, glue_results=PARTIAL_GLUE), tmp_path)
    front_matter = yaml.safe_load((tmp_path / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front_matter["license"] == "apache-2.0"
    assert front_matter["language"] == "en"
    assert front_matter["datasets"] == ["owner/text"]
    assert front_matter["pipeline_tag"] == "fill-mask"
    assert front_matter["library_name"] == "transformers"
    assert "hf_cram" in front_matter["tags"]
    assert "base_model" not in front_matter
    (index,) = front_matter["model-index"]
    assert index["name"] == "quickstart"
    assert metrics_of(ModelCard.load(tmp_path / "README.md")) == {
        ("owner/text", None, None, "loss"): 3.9129,
        ("nyu-mll/glue", "cola", "validation", "matthews_correlation"): 11.0,
        ("nyu-mll/glue", "stsb", "validation", "pearson"): 71.0,
        ("nyu-mll/glue", "stsb", "validation", "spearmanr"): 69.5,
        ("nyu-mll/glue", "wnli", "validation", "accuracy"): 56.3,
    }


def test_a_table_that_was_counted_stands_beside_the_parameters():
    card = build(results=RESULTS | {"neighbour_table_bytes": 67108864})
    assert rows_of(card.text)["Parameters"][1] == "4,723,840, and a table of 67,108,864 bytes, counted from the text"


def test_every_data_set_of_a_mix_is_named():
    card = build(dataset_names=["owner/books", "owner/web"])
    assert card.data.to_dict()["datasets"] == ["owner/books", "owner/web"]
    assert ("held-out", None, None, "loss") in metrics_of(card)


def test_the_loss_on_a_mix_is_no_score_on_one_of_its_data_sets(tmp_path):
    for whole, told in ((None, "held-out"), ("allenai/c4", "allenai/c4")):
        card = build(dataset_names=["allenai/c4"], held_out_of=whole)
        assert [result.dataset_type for result in card.data.eval_results] == [told]
        assert card.data.datasets == ["allenai/c4"]
        save_model_card(card, tmp_path / told)
        assert (tmp_path / told / ".eval_results").exists() == (whole is not None)


def test_text_of_this_machine_is_no_dataset():
    assert "datasets" not in build().data.to_dict()
    assert ("held-out", None, None, "loss") in metrics_of(build())


def test_eval_results_are_parsed_by_the_library(tmp_path):
    save_model_card(build(dataset_names=["owner/text"], held_out_of="owner/text", glue_results=WHOLE_GLUE), tmp_path)
    folder = tmp_path / ".eval_results"
    glue = parse_eval_result_entries(yaml.safe_load((folder / "glue.yaml").read_text()))
    assert {entry.task_id: entry.value for entry in glue} == dict.fromkeys(GLUE_COLUMNS, 60.0)
    assert {entry.dataset_id for entry in glue} == {"nyu-mll/glue"}
    (loss,) = parse_eval_result_entries(yaml.safe_load((folder / "masked_language_modeling.yaml").read_text()))
    assert (loss.dataset_id, loss.value) == ("owner/text", 3.9129)
    assert "nats" in loss.notes
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".README") or ".yaml." in path.name]


def test_partial_glue_stands_beside_the_papers_rows_and_says_what_is_missing():
    card = build(glue_results=PARTIAL_GLUE)
    rows = rows_of(card.text)
    assert "Not run: MNLI-m, MNLI-mm, SST-2, RTE, QNLI, QQP, MRPC; " in card.text
    assert "medians of 3 seeds" in card.text
    assert rows["model"][-2:] == ["GLUE", "mean of 2"]
    ours = dict(zip(rows["model"], rows["this model"], strict=True))
    assert (ours["STS-B"], ours["CoLA"], ours["SST-2"], ours["GLUE"], ours["mean of 2"]) == (
        "71.0", "11.0", "", "", "41.0",
    )  # fmt: skip
    paper = dict(zip(rows["model"], rows["BERT-base, fully trained"], strict=True))
    assert (paper["STS-B"], paper["GLUE"]) == ("86.7", "80.9")
    assert float(paper["mean of 2"]) == pytest.approx((86.7 + 56.5) / 2, abs=0.05)
    assert {"BERT-base, no pretraining", "crammed v1, RTX A6000", "crammed v2, RTX A6000, best checkpoint"} <= set(
        rows
    )
    assert rows["STS-B"][1:] == ["spearmanr", "69.5", "69.0, 70.0, 69.5"]


def test_whole_glue_is_averaged_over_nine_columns():
    rows = rows_of(build(glue_results=WHOLE_GLUE).text)
    assert rows["model"][-1] == "GLUE"
    assert rows["this model"][-1] == "60.0"
    assert rows["crammed v1, RTX A6000"][-1] == f"{PAPER_GLUE_ROWS['crammed v1, RTX A6000']['average']:.1f}"
    assert "Not run" not in build(glue_results=WHOLE_GLUE).text
    mnli = [key for key in metrics_of(build(glue_results=WHOLE_GLUE)) if key[1] == "mnli"]
    assert {split for _, _, split, _ in mnli} == {"validation_matched", "validation_mismatched"}


def test_training_on_a_part_is_not_compared_with_the_papers():
    results = {**WHOLE_GLUE, "setting": {"max_train_samples": 10_000}}
    card, limit = build(glue_results=results), "at most 10,000 training examples a task"
    rows = rows_of(card.text)
    assert rows["model"][-2:] == ["GLUE", "mean of 9"]
    assert rows[f"this model, {limit}"][-2:] == ["", "60.0"]
    assert f"fine-tuned on {limit}, theirs on all" in card.text
    names = [result.metric_name for result in card.data.eval_results if result.dataset_type == "nyu-mll/glue"]
    assert all(name.endswith(f"(per cent, median of 1 seed, {limit})") for name in names)
    own = {"tasks": {"reviews": {"accuracy": scores(88.0)}}, "columns": ["reviews"], "seeds": [1]}
    assert limit in build(glue_results={**own, "setting": {"max_train_samples": 10_000}}).text
    assert limit not in build(glue_results={**own, "setting": {"max_train_samples": None}}).text


def test_own_task_without_average_is_listed():
    own = {"tasks": {"reviews": {"accuracy": scores(88.0)}}, "average": None, "columns": ["reviews"], "seeds": [1]}
    card = build(glue_results=own)
    assert rows_of(card.text)["reviews"][1:] == ["accuracy", "88.0", "88.0"]
    assert ("reviews", None, "validation", "accuracy") in metrics_of(card)
    assert "GLUE" not in card.text


def test_own_data_leaves_glue_in_the_card(tmp_path):
    own = {"tasks": {"reviews": {"accuracy": scores(88.0)}}, "average": None, "columns": ["reviews"], "seeds": [1]}
    save_model_card(build(glue_results=PARTIAL_GLUE), tmp_path)
    assert update_model_card(tmp_path, glue_results=own)
    card = ModelCard.load(tmp_path / "README.md")
    assert rows_of(card.text)["this model"]
    assert rows_of(card.text)["reviews"]
    assert {"reviews", "nyu-mll/glue"} <= {key[0] for key in metrics_of(card)}


def test_update_gives_what_building_with_the_evaluations_gives(tmp_path):
    save_model_card(build(), tmp_path)
    assert update_model_card(tmp_path, glue_results=WHOLE_GLUE)
    assert update_model_card(tmp_path, minimal_pairs=PAIRS)
    assert update_model_card(tmp_path, glue_results=PARTIAL_GLUE)
    once = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert metrics_of(ModelCard(once)) == metrics_of(build(glue_results=PARTIAL_GLUE, minimal_pairs=PAIRS))
    assert ModelCard(once).text == build(glue_results=PARTIAL_GLUE, minimal_pairs=PAIRS).text
    entries = yaml.safe_load((tmp_path / ".eval_results" / "glue.yaml").read_text())
    assert [entry["dataset"]["task_id"] for entry in entries] == ["cola", "stsb", "wnli"]
    assert update_model_card(tmp_path, glue_results=PARTIAL_GLUE, minimal_pairs=PAIRS)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == once


def test_update_keeps_what_a_person_has_written(tmp_path):
    text = "# Mine\n\nA story of its own, with a table:\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nThe end.\n"
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\nfavourite: yes please\n---\n\n{text}", encoding="utf-8")
    for _ in range(2):
        assert update_model_card(tmp_path, glue_results=PARTIAL_GLUE)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.startswith(f"\n{text.rstrip()}\n")
    assert card.text.count("## GLUE") == 1
    assert (card.data.license, card.data["favourite"]) == ("mit", "yes please")
    assert ("nyu-mll/glue", "stsb", "validation", "pearson") in metrics_of(card)


@pytest.mark.parametrize(("lost", "left"), [("end of glue", "glue"), ("glue", "end of glue")])
def test_a_section_that_has_lost_a_mark_takes_nothing_with_it(tmp_path, lost, left):
    save_model_card(build(), tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text().replace(f"<!-- hf_cram: {lost} -->", "My notes."))
    for _ in range(3):
        update_model_card(tmp_path, PARTIAL_GLUE)
    text = card.read_text()
    assert "My notes." in text
    assert "## How to load" in text
    assert (text.count(f"<!-- hf_cram: {lost} -->"), text.count(f"<!-- hf_cram: {left} -->")) == (1, 2)


@pytest.mark.parametrize(("written", "read"), [("no", "no"), ("[no, en]", ["no", "en"]), ("'no'", "no"), ("de", "de")])
def test_norwegian_stays_a_language(tmp_path, written, read):
    card = tmp_path / "README.md"
    card.write_text(f"---\nlanguage: {written}\n---\n# Mine\n", encoding="utf-8")
    update_model_card(tmp_path, PARTIAL_GLUE)
    assert yaml.safe_load(card.read_text(encoding="utf-8").split("---")[1])["language"] == read


def test_a_byte_order_mark_does_not_hide_the_front_matter(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n", encoding="utf-8-sig")
    update_model_card(tmp_path, PARTIAL_GLUE)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ModelCard(text).data.license == "mit"
    assert text.count("license: mit") == 1


def test_wnli_alone_is_compared_with_nothing(tmp_path):
    card = build(glue_results={**PARTIAL_GLUE, "tasks": {"wnli": PARTIAL_GLUE["tasks"]["wnli"]}, "columns": []})
    assert "mean of" not in card.text
    assert "BERT-base" not in card.text
    assert "| WNLI | accuracy | 56.3 |" in card.text


def test_no_card_or_a_broken_one(tmp_path):
    assert not update_model_card(tmp_path, glue_results=PARTIAL_GLUE)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "README.md").write_text("---\nlanguage: [en\n---\n# Mine\n", encoding="utf-8")
    with pytest.raises(ModelCardError, match="README.md cannot be read"):
        update_model_card(tmp_path, glue_results=PARTIAL_GLUE)
    assert (tmp_path / "README.md").read_text(encoding="utf-8").endswith("# Mine\n")
    (tmp_path / "README.md").write_text("---\n2024: x\n---\n# Mine\n", encoding="utf-8")
    with pytest.raises(ModelCardError, match="README.md cannot be read"):
        update_model_card(tmp_path, glue_results=PARTIAL_GLUE)


def test_results_of_a_run_without_budget_and_evaluation():
    results = {key: value for key, value in RESULTS.items() if key not in ("eval_loss", "time_budget_seconds")}
    card = build(results=json.loads(json.dumps(results)))
    assert "model-index" not in card.data.to_dict()
    assert "no time budget (step limit)" in card.text
    assert "not evaluated" in card.text
