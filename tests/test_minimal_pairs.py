"""The zero-shot probe: exact scores, whatever the batches, and a clear line for what cannot be scored."""

import gzip
import json
import runpy
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, VOCAB_SIZE
from datasets import Dataset
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from hf_cram import CrammedBertConfig, CrammedBertForMaskedLM, minimal_pairs, pseudo_likelihood
from hf_cram.minimal_pair_sources import MinimalPair, MinimalPairsError, read_pairs
from hf_cram.minimal_pairs import main, make_fast, score_pairs
from hf_cram.pseudo_likelihood import compile_encoder, pseudo_log_likelihoods, surrounding_tokens

PAIRS = REPOSITORY / "tests" / "data" / "minimal_pairs"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def sentences(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in rng.integers(0, VOCAB_SIZE - 5, rng.integers(1, 9))) for _ in range(count)]


@pytest.fixture
def models(tiny_config):
    torch.manual_seed(0)
    table = {"neighbour_table_entries": 50, "neighbour_table_size": 16, "mask_token_id": 4}
    with_table = CrammedBertForMaskedLM(CrammedBertConfig(**{**tiny_config.to_dict(), **table}))
    with_table.neighbour_table.table.random_(-127, 128)
    return {
        "crammed_bert": CrammedBertForMaskedLM(tiny_config),
        "neighbour_table": with_table,
        "bert": BertForMaskedLM(BertConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=64, **SMALL)),
        "modernbert": ModernBertForMaskedLM(ModernBertConfig(vocab_size=VOCAB_SIZE, pad_token_id=0, **SMALL)),
    }


def obvious_score(model, tokenizer, sentence):
    """One forward pass of the whole model for each token."""
    before, after = surrounding_tokens(model, tokenizer)
    ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
    total = 0.0
    for index, token in enumerate(ids):
        masked = [*before, *ids, *after]
        masked[len(before) + index] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([masked])).logits[0, len(before) + index]
        total += float(logits.log_softmax(-1)[token])
    return total


@pytest.mark.parametrize("name", ["crammed_bert", "neighbour_table", "bert", "modernbert"])
@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_scores_are_those_of_one_token_at_a_time(models, tokenizer, name, batch_tokens):
    model = models[name].eval()
    texts = [*sentences(12), *sentences(3)]  # with repetitions
    expected = [obvious_score(model, tokenizer, text) for text in texts]
    scores = pseudo_log_likelihoods(model, tokenizer, texts, batch_tokens=batch_tokens)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crammed_bert", "neighbour_table", "bert"])
def test_a_compiled_encoder_gives_the_same_scores(models, tokenizer, name):
    expected = pseudo_log_likelihoods(models[name], tokenizer, sentences(12))
    compile_encoder(models[name])
    np.testing.assert_allclose(pseudo_log_likelihoods(models[name], tokenizer, sentences(12)), expected, atol=1e-4)


@pytest.mark.parametrize(("bf16", "is_faster", "dtype"), [
    (None, True, torch.bfloat16), (None, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.float32),
])  # fmt: skip
def test_precision_is_as_told_or_as_measured(models, tokenizer, monkeypatch, bf16, is_faster, dtype):
    model = models["crammed_bert"]
    monkeypatch.setattr(minimal_pairs, "bf16_scores_faster", lambda *arguments: is_faster)
    make_fast(model, tokenizer, [MinimalPair("w1", "w2")], bf16, torch_compile=False)
    assert model.dtype == dtype


@pytest.mark.parametrize(
    ("told", "pairs", "compiles"), [(None, 9, False), (None, 10, True), (True, 1, True), (False, 99, False)]
)
def test_many_pairs_are_worth_compiling(models, tokenizer, monkeypatch, told, pairs, compiles):
    compiled = []
    monkeypatch.setattr(minimal_pairs, "COMPILED_PAIRS", 10)
    monkeypatch.setattr(minimal_pairs, "can_compile", lambda device: True)
    monkeypatch.setattr(minimal_pairs, "compile_encoder", compiled.append)
    make_fast(models["crammed_bert"], tokenizer, [MinimalPair("w1", "w2")] * pairs, bf16=False, torch_compile=told)
    assert bool(compiled) == compiles


def test_measuring_the_precision_changes_nothing(models, tokenizer):
    model = models["crammed_bert"].eval()
    expected = pseudo_log_likelihoods(model, tokenizer, sentences(3))
    minimal_pairs.bf16_scores_faster(model, tokenizer, [MinimalPair("w1 w2", "w2 w1")], rounds=1)
    assert model.dtype == torch.float32
    np.testing.assert_array_equal(pseudo_log_likelihoods(model, tokenizer, sentences(3)), expected)


@pytest.mark.parametrize("bf16_is_faster", [True, False])
def test_the_faster_precision_is_taken(models, tokenizer, monkeypatch, bf16_is_faster):
    now = [0.0]

    def score(model, *_, **__):
        if (model.dtype == torch.bfloat16) != bf16_is_faster:
            now[0] += 1

    monkeypatch.setattr(minimal_pairs, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(minimal_pairs, "pseudo_log_likelihoods", score)
    pairs = [MinimalPair("w1", "w2")]
    assert minimal_pairs.bf16_scores_faster(models["crammed_bert"], tokenizer, pairs) == bf16_is_faster


def test_a_model_in_training_mode_is_scored_without_dropout_and_stays_in_it(models, tokenizer):
    model = models["bert"]  # with dropout
    expected = pseudo_log_likelihoods(model.eval(), tokenizer, sentences(2))
    np.testing.assert_array_equal(pseudo_log_likelihoods(model.train(), tokenizer, sentences(2)), expected)
    assert model.training


def test_the_crammed_bert_reads_a_sentence_as_its_rows(models, tokenizer):
    separator = tokenizer.sep_token_id
    assert surrounding_tokens(models["crammed_bert"], tokenizer) == ([separator], [separator])


def test_accuracy_is_the_share_of_right_pairs_and_a_tie_counts_half(models, tokenizer):
    model = models["crammed_bert"].eval()
    texts = sentences(20, seed=1)
    scores = [obvious_score(model, tokenizer, text) for text in texts]
    pairs = [
        MinimalPair(a, b, f"kind {number % 2}")
        for number, (a, b) in enumerate(zip(texts[::2], texts[1::2], strict=True))
    ]
    right = [a > b for a, b in zip(scores[::2], scores[1::2], strict=True)]
    results = score_pairs(model, tokenizer, [*pairs, MinimalPair("w1 w2", "w1 w2", "tie")])
    assert results["pairs"] == 11
    assert results["accuracy"] == pytest.approx(100 * (sum(right) + 0.5) / 11)
    assert results["phenomena"]["tie"] == {"accuracy": 50.0, "pairs": 1}
    assert results["phenomena"]["kind 1"] == {"accuracy": pytest.approx(100 * sum(right[1::2]) / 5), "pairs": 5}


# ---- Reading ----


def test_files_folders_and_compressed_files(tmp_path):
    assert len(read_pairs([str(PAIRS)])) == 40
    assert {pair.phenomenon for pair in read_pairs([str(PAIRS)])} == {path.stem for path in PAIRS.glob("*.jsonl")}
    file = PAIRS / "word_order.jsonl"
    with gzip.open(tmp_path / "word_order.jsonl.gz", "wt") as stream:
        stream.write(file.read_text())
    plain, compressed = read_pairs([str(file)]), read_pairs([str(tmp_path)])
    assert [pair[:3] for pair in compressed] == [pair[:3] for pair in plain]
    assert plain[0][:2] == ("The old man sat down.", "The man old sat down.")
    assert len(read_pairs([str(PAIRS)], limit=3)) == 12


def test_a_file_without_a_name_of_the_phenomenon(tmp_path):
    (tmp_path / "verbs.jsonl").write_text('{"sentence_good": "a", "sentence_bad": "b"}\n\n')
    assert read_pairs([str(tmp_path)])[0].phenomenon == "verbs"


def test_a_data_set_laid_out_like_one_of_the_hub(tmp_path, monkeypatch):
    folder = tmp_path / "nyu-mll" / "blimp"
    lines = [json.loads(line) for line in (PAIRS / "word_order.jsonl").read_text().splitlines()]
    folder.mkdir(parents=True)
    Dataset.from_list(lines).to_parquet(folder / "word_order" / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: word_order\n  data_files: word_order/train-*\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    # A folder without .jsonl files is taken for what datasets makes of it.
    assert [pair[:3] for pair in read_pairs(["nyu-mll/blimp"])] == [
        pair[:3] for pair in read_pairs([str(PAIRS / "word_order.jsonl")])
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sentence_good": "a", "sentence_bad": "b"}\n{"sentence_good": "a"}\n', "line 2: no sentence .*'sentence_bad'"),
        ('{"sentence_good": "a", "sentence_bad": "b"\n', "line 1: not valid JSON"),
        ("[1]\n", "line 1: not an object"),
        ("\n", "holds no pairs"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ("[" * 100_000 + "\n", "line 1: not valid JSON"),
        (f'{{"a": {"1" * 5000}}}\n', "line 1: not valid JSON"),
        ('{"sentence_good": "a \\ud800", "sentence_bad": "b"}\n', "line 1: .*'sentence_good' has half a character"),
    ],
)  # fmt: skip
def test_pairs_that_cannot_be_read(tmp_path, content, message):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MinimalPairsError, match=f"pairs.jsonl.*{message}"):
        read_pairs([str(file)])


@pytest.mark.parametrize("name", ["README.md", "train.parquet"])
def test_a_damaged_data_set_is_one_line(tmp_path, name):
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    (tmp_path / name).write_text("---\nconfigs: a: b\n---\n")
    with pytest.raises(MinimalPairsError, match=f"data set '{tmp_path}' cannot be loaded: "):
        read_pairs([str(tmp_path)])


def test_pairs_of_equal_sentences_are_left_out_and_counted(tmp_path, caplog):
    rows = [{"sentence_good": "w1", "sentence_bad": bad} for bad in ("w2", "w1", "w1", "w3")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "old.jsonl").mkdir()  # a folder among the files
    assert [pair.bad for pair in read_pairs([str(tmp_path)])] == ["w2", "w3"]
    assert f"2 pairs of equal sentences are left out, the first: {tmp_path / 'pairs.jsonl'}, line 2" in caplog.text
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"sentence_good": "w1", "sentence_bad": "w1"}))
    with pytest.raises(MinimalPairsError, match="no pairs to score: both sentences of each are equal"):
        read_pairs([str(tmp_path)])


def test_sentences_that_cannot_be_scored(models, tokenizer):
    too_long = " ".join(["w1"] * 63)
    with pytest.raises(MinimalPairsError, match="a pair: a sentence of 65 tokens is longer than the model's 64"):
        score_pairs(models["crammed_bert"], tokenizer, [MinimalPair(too_long, "w1")])
    models["crammed_bert"].config.vocab_size = 90
    with pytest.raises(
        MinimalPairsError, match="a pair: token 104 of the tokenizer is beyond the model's 90 embeddings"
    ):
        score_pairs(models["crammed_bert"], tokenizer, [MinimalPair("w1", "w99")])


# ---- The program ----


@pytest.fixture
def model_folder(models, tokenizer, tmp_path):
    folder = tmp_path / "model"
    models["crammed_bert"].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_program_writes_results_and_card(model_folder, capsys):
    shutil.copyfile(REPOSITORY / "tests" / "data" / "model_card.md", model_folder / "README.md")
    main([str(model_folder), "--pairs", str(PAIRS)])
    results = json.loads((model_folder / "minimal_pairs_results.json").read_text())
    assert results["pairs"] == 40
    assert results["model"] == model_folder.name  # and not where it lies
    assert set(results["phenomena"]) == {path.stem for path in PAIRS.glob("*.jsonl")}
    printed = capsys.readouterr().out
    assert f"{results['accuracy']:.1f}" in printed
    assert "anaphor_agreement" in printed
    assert f"in {results['accuracy']:.1f} % of 40 pairs" in (model_folder / "README.md").read_text()


def test_scores_do_not_go_into_the_folder_of_another_model(model_folder, tmp_path, monkeypatch):
    other = shutil.copytree(model_folder, tmp_path / "other")
    with pytest.raises(
        SystemExit, match="--output_dir: .*other holds a model, and these would not be the scores of it"
    ):
        main([str(model_folder), "--pairs", str(PAIRS), "--output_dir", str(other)])
    monkeypatch.chdir(other)
    with pytest.raises(SystemExit, match="--output_dir: . holds a model"):
        main(["a-model-of-the-hub", "--pairs", str(PAIRS)])
    assert not list(tmp_path.rglob("minimal_pairs_results.json"))


def test_the_scores_of_another_model_are_never_replaced(model_folder, tmp_path):
    arguments = ["--pairs", str(PAIRS), "--limit", "1", "--output_dir", str(tmp_path / "out")]
    main([str(model_folder), *arguments])
    other = shutil.copytree(model_folder, tmp_path / "other")
    with pytest.raises(SystemExit, match="minimal_pairs_results.json holds the scores of another model: name another"):
        main([str(other), *arguments])
    main([str(model_folder), *arguments])
    assert json.loads((tmp_path / "out" / "minimal_pairs_results.json").read_text())["model"] == "model"


def test_a_model_of_the_same_folder_name_is_another_one(model_folder, tiny_config, tokenizer, tmp_path):
    arguments = ["--pairs", str(PAIRS), "--limit", "1", "--output_dir", str(tmp_path / "out")]
    main([str(model_folder), *arguments])
    other = tmp_path / "elsewhere" / model_folder.name
    CrammedBertForMaskedLM(tiny_config).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(SystemExit, match="minimal_pairs_results.json holds the scores of another model: name another"):
        main([str(other), *arguments])


def test_fewer_pairs_do_not_replace_more(model_folder, caplog):
    main([str(model_folder), "--pairs", str(PAIRS), "--limit", "2"])
    before = (model_folder / "minimal_pairs_results.json").read_text()
    main([str(model_folder), "--pairs", str(PAIRS), "--limit", "1"])
    assert (model_folder / "minimal_pairs_results.json-1").read_text() == before
    assert "were moved to minimal_pairs_results.json-1" in caplog.text
    main([str(model_folder), "--pairs", str(PAIRS), "--limit", "2"])
    assert not (model_folder / "minimal_pairs_results.json-2").exists()


def test_what_cannot_be_scored_is_named_by_its_place_when_measuring_too(models, tokenizer):
    pairs = [MinimalPair("the good " * 200, "the bad", "all", "pairs.jsonl, line 3")]
    with pytest.raises(MinimalPairsError, match="^pairs.jsonl, line 3: a sentence of .* is longer than"):
        make_fast(next(iter(models.values())), tokenizer, pairs)


def test_fewer_pairs_elsewhere_leave_a_models_fuller_results(model_folder, tmp_path, caplog):
    own = model_folder / "minimal_pairs_results.json"
    main([str(model_folder), "--pairs", str(PAIRS), "--limit", "2"])
    before = own.read_text()
    arguments = [str(model_folder), "--pairs", str(PAIRS)]
    main([*arguments, "--limit", "1", "--output_dir", str(tmp_path / "fewer")])
    assert own.read_text() == before
    assert json.loads((tmp_path / "fewer" / own.name).read_text())["pairs"] < json.loads(before)["pairs"]
    assert "are of more pairs, and stay" in caplog.text
    main([*arguments, "--output_dir", str(tmp_path / "all")])
    assert json.loads(own.read_text())["pairs"] == 40


def test_results_stand_though_the_models_card_cannot_be_read(model_folder, tmp_path, caplog):
    (model_folder / "README.md").write_text("---\na: [1\n---\n")
    main([str(model_folder), "--pairs", str(PAIRS), "--limit", "1", "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "minimal_pairs_results.json").is_file()
    assert "but not all of them with their model: the front matter of" in caplog.text


def test_ctrl_c_is_one_line(model_folder, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_cram.minimal_pairs.score_pairs", interrupt)
    with pytest.raises(SystemExit) as caught:
        main([str(model_folder), "--pairs", str(PAIRS)])
    assert caught.value.code == 130
    assert capsys.readouterr().err.endswith("python -m hf_cram.minimal_pairs: stopped; nothing was written\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "--pairs", "absent.jsonl"], "absent.jsonl: no such file or folder"),
        (["{model}", "--pairs", "~nobody-of-this-name/a.jsonl"], "~nobody-of-this-name/a.jsonl: cannot be read"),
        (["{empty}", "--pairs", str(PAIRS)], "does not load as a masked language model"),
        (["{model}", "--pairs", str(PAIRS), "--device", "nowhere"], "--device nowhere cannot be used"),
        (["{model}", "--pairs", str(PAIRS), "--output_dir", "{model}/config.json"], "File exists: .*config.json"),
    ],
)
def test_mistakes_are_one_line(model_folder, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"model": model_folder, "empty": tmp_path / "empty"}
    with pytest.raises(SystemExit, match=message) as caught:
        main([argument.format(**places) for argument in arguments])
    assert str(caught.value.code).count("\n") == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", "no", "does not load as a masked language model"),
        ("config.json", {"hidden_size": "x"}, "does not load as a masked language model: .*hidden_size.*got str"),
        ("config.json", {"hidden_act": "none"}, "does not load as a masked language model"),
        ("tokenizer.json", "[1]", "tokenizer .* cannot be loaded: its files are damaged"),
        ("tokenizer.json", None, "tokenizer .* cannot be loaded: it has neither"),
    ],
)
def test_damaged_checkpoints_are_one_line(model_folder, name, content, message):
    path = model_folder / name
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=message) as caught:
        main([str(model_folder), "--pairs", str(PAIRS)])
    assert str(caught.value.code).count("\n") == 0


def test_out_of_memory_names_the_batch(model_folder, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(pseudo_likelihood, "_logits_at", fail)
    with pytest.raises(SystemExit, match=r"error: out of memory: lower --batch_tokens \(512\)"):
        main([str(model_folder), "--pairs", str(PAIRS), "--batch_tokens", "512"])


def test_a_classifier_is_no_masked_language_model(tiny_config, tokenizer, tmp_path):
    from hf_cram import CrammedBertModel

    CrammedBertModel(tiny_config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_config.tie_word_embeddings = False
    CrammedBertModel(tiny_config).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="is no masked language model: it lacks"):
        main([str(tmp_path / "model"), "--pairs", str(PAIRS)])


CODE_OF_ITS_OWN = """
from transformers import BertConfig, BertForMaskedLM

class MineConfig(BertConfig):
    model_type = "mine"

class MineForMaskedLM(BertForMaskedLM):
    config_class = MineConfig
"""


def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(models, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    models["bert"].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "modeling_mine.py").write_text(CODE_OF_ITS_OWN)
    config = json.loads((tmp_path / "config.json").read_text())
    places = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForMaskedLM": "modeling_mine.MineForMaskedLM"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": places}))
    arguments = [str(tmp_path), "--pairs", str(PAIRS), "--limit", "1"]
    with pytest.raises(SystemExit, match="trust_remote_code"):
        main(arguments)
    main([*arguments, "--trust_remote_code"])
    assert "all" in capsys.readouterr().out


def test_it_runs_as_a_module(monkeypatch, capsys, model_folder):
    monkeypatch.setattr(sys, "argv", ["minimal_pairs", str(model_folder), "--pairs", str(PAIRS), "--limit", "1"])
    runpy.run_module("hf_cram.minimal_pairs", run_name="__main__")
    assert "all" in capsys.readouterr().out
