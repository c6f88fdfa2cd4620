"""What a person sees."""

import pytest
import torch
from matplotlib.figure import Figure
from transformers import TrainerControl, TrainerState

from hf_cram import CrammedBertForMaskedLM
from hf_cram.callbacks import BudgetProgress, BudgetProgressCallback, draw_loss_curve, fill_sentences


def test_fills_are_words_and_the_model_stays_as_it_was(tiny_config, tokenizer):
    tiny_config.hidden_dropout_prob, tiny_config.decoder_bias = 0.5, True
    model = CrammedBertForMaskedLM(tiny_config).train()
    with torch.no_grad():
        model.decoder.bias[tokenizer.all_special_ids] = 99.0  # the likeliest by far, and no words
    assert fill_sentences(model, tokenizer) == fill_sentences(model, tokenizer)  # without dropout
    fills = fill_sentences(model, tokenizer, ["w1 w2 [MASK] w4", "[MASK] w9"], top_k=4)
    assert [fill["sentence"] for fill in fills] == ["w1 w2 [MASK] w4", "[MASK] w9"]
    assert all(len(fill["fills"]) == 4 for fill in fills)
    assert all(word in tokenizer.get_vocab() and word.startswith("w") for fill in fills for word in fill["fills"])
    # The likeliest ones in the place of the mask, of the sentence and a separator.
    ids = tokenizer("w1 w2 [MASK] w4", add_special_tokens=False)["input_ids"] + [tokenizer.sep_token_id]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0, 2]
    model.train()
    words = sorted((word for word in tokenizer.get_vocab() if word.startswith("w")), key=lambda word: -logits[
        tokenizer.get_vocab()[word]])  # fmt: skip
    assert fills[0]["fills"] == words[:4]
    assert model.training
    assert torch.is_grad_enabled()


def test_a_sentence_beyond_the_positions_is_left_out(tiny_config, tokenizer):
    model = CrammedBertForMaskedLM(tiny_config)
    long = " ".join(["w1"] * tiny_config.max_position_embeddings + ["[MASK]"])
    assert [fill["sentence"] for fill in fill_sentences(model, tokenizer, [long, "[MASK] w9"])] == ["[MASK] w9"]


def test_bar_shows_time_loss_rate_and_where_it_ends(capsys):
    progress = BudgetProgress(
        elapsed_seconds=150.0, time_budget_seconds=600.0, fraction=0.25, unit="tokens", units_seen=1_500_000,
        units_per_second=10_000.0, estimated_units=6_000_000.0,
    )  # fmt: skip
    callback = BudgetProgressCallback(lambda: progress)
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    callback.on_train_begin(None, state, control)
    callback.on_log(None, state, control, logs={"loss": 5.4321})
    callback.on_step_end(None, state, control)
    callback.on_train_end(None, state, control)
    shown = capsys.readouterr().err
    assert "25%" in shown
    assert "0:02:30/0:10:00" in shown
    assert "loss 5.432, 10,000 tokens/s, 1.50M of about 6.00M tokens" in shown


@pytest.mark.parametrize("unit", ["tokens_seen", "samples_seen"])
def test_loss_curve_of_a_short_history(tmp_path, monkeypatch, unit):
    drawn = []

    def record(figure, path, **kwargs):
        drawn.append({axes.get_xlabel(): [line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes})
        savefig(figure, path, **kwargs)

    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", record)
    history = [{"loss": 5.0 - n, "elapsed_seconds": 10.0 * n, unit: 100 * n} for n in range(3)]
    history.append({"eval_loss": 4.0, "elapsed_seconds": 20.0, unit: 200})
    draw_loss_curve(history, tmp_path / "curve.png")
    draw_loss_curve(history[:1], tmp_path / "one_point.png")
    for name in ("curve.png", "one_point.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    training, held_out = [[0.0, 5.0], [10 / 60, 4.0], [20 / 60, 3.0]], [[20 / 60, 4.0]]
    assert drawn[0]["minutes on the clock"] == [training, held_out]
    training, held_out = [[0.0, 5.0], [1e-4, 4.0], [2e-4, 3.0]], [[2e-4, 4.0]]
    assert drawn[0][f"million {unit.removesuffix('_seen')}"] == [training, held_out]
