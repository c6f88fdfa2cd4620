"""The table of what stands between neighbouring tokens: looked up by the model, counted from the text."""

import logging

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE
from test_trainer import StopAt, make_trainer
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, set_seed

from hf_cram import CrammedBertConfig, CrammedBertForMaskedLM, embedding_initialization
from hf_cram.convert_cramming_checkpoint import ConversionError, convert
from hf_cram.embedding_initialization import initialize_embeddings_from_text, own_occurrences_left_out

MASK, SPECIAL_TOKENS = 4, 5
# Of each row of the text: what stands between 10 and 11, behind 30 and 31, before 50 and 51.
PATTERN = [10, 20, 11, 30, 31, 40, 60, 50, 51]


def with_table(config, **fields):
    table = {"neighbour_table_entries": 5000, "neighbour_table_size": 16, "mask_token_id": MASK}
    return CrammedBertConfig(**{**config.to_dict(), **table, **fields})


def text(count=400, length=32):
    """Rows of random words, and in each of them the pattern at a place of its own."""
    rng = np.random.default_rng(0)
    rows = rng.integers(70, VOCAB_SIZE, (count, length))
    for row, start in zip(rows, rng.integers(0, length - len(PATTERN), count), strict=True):
        row[start : start + len(PATTERN)] = PATTERN
    return [{"input_ids": row} for row in rows]


@pytest.fixture
def counted(tiny_config):
    """A model whose table is filled, in fp32 and evaluation."""
    set_seed(0)
    model = CrammedBertForMaskedLM(with_table(tiny_config)).eval()
    initialize_embeddings_from_text(model, text())
    return model


def found(model, ids, **kwargs):
    """The three entries of each token, each (L, size) of one row."""
    module = model.neighbour_table
    ids = torch.tensor([ids])
    position_ids = kwargs.get("position_ids", torch.arange(ids.shape[1]).unsqueeze(0))
    return torch.nn.functional.embedding(module.look_up(ids, position_ids), module.table).float()[0].unbind(1)


@pytest.mark.parametrize(("way", "place", "neighbours"), [(0, 1, (0, 2)), (1, 5, (3, 4)), (2, 6, (7, 8))])
def test_an_entry_points_at_what_stood_there_in_the_text(counted, way, place, neighbours):
    asked = [70, 75, 80, 85, 90, 95, 70, 75, 80]
    for neighbour in neighbours:
        asked[neighbour] = PATTERN[neighbour]
    entry = found(counted, asked)[way][place]
    embeddings = counted.get_input_embeddings().weight[SPECIAL_TOKENS:, : len(entry)]
    likeness = torch.nn.functional.cosine_similarity(entry.unsqueeze(0), embeddings)
    assert likeness.argmax() + SPECIAL_TOKENS == PATTERN[place]


def test_entries_of_which_the_text_says_little_are_nearer_zero(counted):
    often = found(counted, PATTERN)[0][1]
    seldom = torch.stack([found(counted, [70 + index, 99, 100 - index])[0][1] for index in range(10)])
    assert seldom.norm(dim=1).median() < 0.7 * often.norm()


def test_before_any_training_the_model_expects_what_the_text_held(counted):
    of_masks, known = counted.neighbour_table(torch.tensor([[PATTERN[0], MASK, PATTERN[2]]]), None)
    scores = of_masks[0, 1] @ counted.get_input_embeddings().weight[SPECIAL_TOKENS:].T
    assert PATTERN[1] - SPECIAL_TOKENS in scores.topk(3).indices
    assert not of_masks[0, [0, 2]].any()
    assert not known.any()


def test_the_table_helps_masks_and_what_is_predicted_of_other_tokens(counted):
    torch.nn.init.normal_(counted.neighbour_table.to_states.weight)
    ids = torch.tensor([[*PATTERN[:4], MASK, *PATTERN[5:]]])
    of_masks, known = counted.neighbour_table(ids, None)
    assert of_masks.any(-1).tolist() == [[index == 4 for index in range(len(PATTERN))]]
    assert known.any(-1).all()
    embeddings = counted.get_input_embeddings()(ids) + of_masks
    logits = counted.decoder(counted.model(inputs_embeds=embeddings).last_hidden_state + known)
    torch.testing.assert_close(counted(input_ids=ids).logits, logits)


def test_the_encoder_and_other_heads_have_no_table(counted, tmp_path):
    counted.save_pretrained(tmp_path)
    ids = torch.tensor([PATTERN])
    encoder, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["unexpected_keys"]
    torch.testing.assert_close(encoder(ids).last_hidden_state, counted.model(ids).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for model in (encoder, classifier):
        assert not any("neighbour_table" in name for name in model.state_dict())
    assert classifier(inputs_embeds=encoder.get_input_embeddings()(ids)).logits.shape == (1, 2)


def test_logits_at_chosen_positions_know_of_other_masks_too(counted):
    torch.nn.init.normal_(counted.neighbour_table.to_states.weight)
    ids = torch.tensor([[*PATTERN[:4], MASK, *PATTERN[5:8], MASK]])
    logits = counted(input_ids=ids, masked_positions=torch.tensor([[4]])).logits
    torch.testing.assert_close(logits, counted(input_ids=ids).logits[:, 4:5])


def test_the_loss_at_chosen_positions_is_that_of_all(counted):
    torch.nn.init.normal_(counted.neighbour_table.to_states.weight)
    rows = torch.tensor(np.stack([row["input_ids"] for row in text()[:4]]))
    positions = torch.tensor([[3, 9, 20], [0, 1, 31], [5, 6, 7], [12, 14, 30]])
    labels = torch.full_like(rows, -100).scatter(1, positions, rows.gather(1, positions))
    masked = rows.scatter(1, positions[:, :2], MASK)  # the last of each row is shown as it is
    counted.train()
    with own_occurrences_left_out(counted, text()):
        sparse = counted(input_ids=masked, labels=labels, masked_positions=positions).loss
        torch.testing.assert_close(sparse, counted(input_ids=masked, labels=labels).loss)


def test_a_token_sees_two_neighbours_to_either_side(counted):
    before = found(counted, PATTERN)
    for offset in (-3, -2, -1, 0, 1, 2, 3):
        ids = list(PATTERN)
        ids[4 + offset] = 99
        changes = [not torch.equal(now[4], then[4]) for now, then in zip(found(counted, ids), before, strict=True)]
        assert changes == [offset in pair for pair in ((-1, 1), (-2, -1), (1, 2))]


def test_beside_a_mask_nothing_is_found(counted):
    ids = [*PATTERN[:4], MASK, *PATTERN[5:]]
    beside = ((3, 5), (5, 6), (2, 3))
    for entries, before, places in zip(found(counted, ids), found(counted, PATTERN), beside, strict=True):
        assert before[list(places)].any(1).all()
        before[list(places)] = 0
        assert torch.equal(entries, before)


def test_padding_and_other_sequences_are_no_neighbours(counted):
    alone = counted(input_ids=torch.tensor([PATTERN])).logits[0]
    padded = torch.tensor([[*PATTERN, 0, 0, 0]])
    together = counted(input_ids=padded, attention_mask=(padded != 0).long()).logits[0, : len(PATTERN)]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    position_ids = torch.arange(len(PATTERN)).repeat(2).unsqueeze(0)
    packed = found(counted, [*PATTERN, *PATTERN], position_ids=position_ids)
    for entries, single in zip(packed, found(counted, PATTERN), strict=True):
        assert torch.equal(entries, torch.cat((single, single)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_comes_back_as_it_was(counted, tmp_path, dtype):
    counted.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(loaded.neighbour_table.table, counted.neighbour_table.table)
    assert loaded.neighbour_table.table.any()
    ids = torch.tensor([PATTERN])
    logits = loaded(input_ids=ids).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), counted(input_ids=ids).logits, atol=0.05, rtol=0.05)


def test_a_vocabulary_that_grew_comes_back(counted, tmp_path):
    expected = counted(input_ids=torch.tensor([PATTERN])).logits
    counted.resize_token_embeddings(VOCAB_SIZE + 3)
    counted.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(input_ids=torch.tensor([PATTERN])).logits[..., :VOCAB_SIZE], expected)
    initialize_embeddings_from_text(loaded, text())
    with own_occurrences_left_out(loaded, text()):
        batch = torch.tensor([[*PATTERN, VOCAB_SIZE + 2]])
        assert loaded.train()(input_ids=batch, labels=batch).loss.isfinite()


def test_a_table_that_a_checkpoint_lacks_is_empty(tiny_config, tmp_path):
    plain = CrammedBertForMaskedLM(tiny_config).eval()
    plain.save_pretrained(tmp_path)
    grown = CrammedBertForMaskedLM.from_pretrained(tmp_path, neighbour_table_entries=100, neighbour_table_size=8)
    ids = torch.tensor([PATTERN])
    assert torch.equal(grown(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_table_cannot_be_written_in_the_papers_format(counted, tmp_path):
    counted.save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match="neighbour_table_entries = 5000 cannot be written"):
        convert(tmp_path / "ours", tmp_path / "theirs")


def test_a_table_is_looked_up_by_token_ids(tiny_config):
    model = CrammedBertForMaskedLM(with_table(tiny_config))
    with pytest.raises(ValueError, match="looked up by input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, tiny_config.hidden_size))


def test_a_table_wider_than_the_model_is_refused(tiny_config):
    with pytest.raises(Exception, match=r"neighbour_table_size \(64\) must not be above hidden_size \(32\)"):
        with_table(tiny_config, neighbour_table_size=64)
    for entries in (-1, 1):
        with pytest.raises(Exception, match=f"neighbour_table_entries must be 0 or at least 2, got {entries}"):
            with_table(tiny_config, neighbour_table_entries=entries)


def test_compiles_without_graph_breaks(counted):
    counted = counted.train()
    compiled = torch.compile(counted, fullgraph=True, backend="aot_eager")
    ids, positions = torch.tensor([PATTERN]), torch.tensor([[1, 5]])
    labels = torch.full_like(ids, -100).scatter(1, positions, 9)
    batch = {"input_ids": ids, "labels": labels, "masked_positions": positions}
    torch.testing.assert_close(compiled(**batch).loss, counted(**batch).loss)
    counted.eval()


def test_training_moves_the_projections_and_not_the_table(tiny_config, tokenizer, tmp_path, caplog):
    trainer = make_trainer(
        with_table(tiny_config), tokenizer, tmp_path / "out", max_steps=3, embeddings_from_text=True, learning_rate=1e-3,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "neighbour table" not in caplog.text
    trained = trainer.model.neighbour_table
    untouched = CrammedBertForMaskedLM(trainer.model.config)
    initialize_embeddings_from_text(untouched, trainer.train_dataset, trainer.args.seed)
    fresh = untouched.neighbour_table
    assert torch.equal(trained.table, fresh.table)
    for name in ("to_embeddings.weight", "to_states.weight"):
        assert not torch.equal(trained.get_parameter(name), fresh.get_parameter(name))


@pytest.mark.parametrize(("given", "kept"), [(None, False), (True, True)])
def test_data_parallel_processes_do_not_send_the_table_at_each_step(tiny_config, tokenizer, tmp_path, given, kept):
    trainer = make_trainer(with_table(tiny_config), tokenizer, tmp_path, max_steps=1, ddp_broadcast_buffers=given)
    assert trainer.args.ddp_broadcast_buffers is kept
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=1, ddp_broadcast_buffers=given)
    assert trainer.args.ddp_broadcast_buffers is given


def test_a_stopped_and_resumed_run_leaves_out_the_same(tiny_config, tokenizer, tmp_path):
    learned = []
    for folder, sessions in (("whole", ([],)), ("parts", ([StopAt(3)], []))):
        for number, callbacks in enumerate(sessions):
            trainer = make_trainer(
                with_table(tiny_config), tokenizer, tmp_path / folder, max_steps=6, save_interval="50%",
                embeddings_from_text=True, callbacks=callbacks,
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=number > 0)
        learned.append(trainer.model.state_dict())
    for name, tensor in learned[0].items():
        assert torch.equal(tensor, learned[1][name]), name


def test_a_table_that_nothing_fills_is_told(tiny_config, tokenizer, tmp_path, caplog):
    trainer = make_trainer(with_table(tiny_config), tokenizer, tmp_path / "out", max_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "neighbour table is empty" in caplog.text


def test_a_tokens_own_occurrence_is_left_out_where_it_was_counted(counted):
    module = counted.neighbour_table
    rows, position_ids = torch.tensor(np.stack([row["input_ids"] for row in text()])), torch.arange(32).unsqueeze(0)
    every = position_ids.expand(2, -1)
    entries = module.look_up(rows, position_ids)  # (N, L, 3)
    with own_occurrences_left_out(counted, text()):
        found = module.find(rows[:2], position_ids, every, rows[:2])
    for row, place, way in ((0, 3, 0), (0, 31, 1), (1, 0, 2), (1, 17, 0)):
        where = entries == entries[row, place, way]
        where[row, place, way] = False
        others = module.parts[rows.unsqueeze(-1).expand_as(entries)[where]]
        expected = others.sum(0) / (len(others) + 3)
        torch.testing.assert_close(found[row, place, way], expected, atol=0.004, rtol=0.02)
    whole = module.find(rows[:2], position_ids, every, None)
    assert torch.equal(module.find(rows[:2], position_ids, every, rows[:2]), whole)


def test_beside_a_replaced_token_nothing_is_left_out(counted):
    module = counted.neighbour_table
    original, position_ids = torch.tensor([PATTERN]), torch.arange(len(PATTERN)).unsqueeze(0)
    replaced = original.clone()
    replaced[0, 4] = 99
    with own_occurrences_left_out(counted, text()):
        left_out = module.find(replaced, position_ids, position_ids, original)[0]
    whole = module.find(replaced, position_ids, position_ids, None)[0]
    same = [
        [torch.equal(left_out[place, way], whole[place, way]) for way in range(3)] for place in range(len(PATTERN))
    ]
    assert [place for place, ways in enumerate(same) if ways[0]] == [3, 5]
    assert [place for place, ways in enumerate(same) if ways[1]] == [5, 6]
    assert [place for place, ways in enumerate(same) if ways[2]] == [2, 3]


def test_more_text_than_is_counted_has_nothing_to_leave_out(counted, monkeypatch):
    monkeypatch.setattr(embedding_initialization, "MOST_TABLE_TOKENS", 100 * 32)
    module = counted.neighbour_table
    with own_occurrences_left_out(counted, text()):
        assert not module.leaves_out
    with own_occurrences_left_out(counted, text(count=100)):
        assert module.leaves_out
    assert not module.leaves_out
