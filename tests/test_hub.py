"""Pushing with the real client to a Hub on the loopback interface, with and without its faults."""

import errno
import importlib.util
import json
import os
import queue
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading

import httpx2
import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY
from datasets import Dataset
from forked_calls import forked_calls, logged_in_environment
from hub_server import CUT, SILENCE, TOKEN, Fault, running_hub
from huggingface_hub import ModelCard, get_session
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load, load_file
from transformers import AutoModelForMaskedLM

from hf_cram import hub
from hf_cram.hub import HubError, HubPusher, HubTarget, shareable_files
from hf_cram.hub_errors import explain, with_retries

WORDS = ["the", "old", "man", "saw", "a", "boat", "near", "house", "and", "went", "home", "by", "night", "with", "his"]
SMALL = [
    "--vocab_size", "200", "--max_seq_length", "32", "--eval_rows", "16", "--hidden_size", "32",
    "--num_hidden_layers", "2", "--num_attention_heads", "2", "--intermediate_size", "64",
    "--per_device_train_batch_size", "8", "--learning_rate", "5e-3", "--bf16", "false", "--torch_compile", "false",
]  # fmt: skip
CODE = {"configuration_crammed_bert.py", "modeling_crammed_bert.py"}
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
RESULTS = {"README.md", "all_results.json", "recipe.yaml", "loss_curve.png"}
HEADS = ("", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification",
         "ForQuestionAnswering", "ForMultipleChoice", "ForTextEncoding")  # fmt: skip
REFUSED = f"the Hub cannot be reached ([Errno {errno.ECONNREFUSED}] Connection refused)"
COMMAND = re.compile(r"python -m hf_cram\.hub (.*)")

# The waits between attempts, the client's included, are cut short.
DRIVER = """
import huggingface_hub.constants, huggingface_hub.utils._http as client
import hf_cram.hub, hf_cram.hub_errors, run_mlm_cram
hf_cram.hub_errors.RETRY_SECONDS, hf_cram.hub_errors.SILENCE_SECONDS = (0.1, 0.2, 0.4), 1.0
client.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.02))})

def run(job):
    huggingface_hub.constants.ENDPOINT = job["endpoint"]
    sys.argv = job["command"]
    if sys.argv[0] == "hf_cram.hub":
        hf_cram.hub.main(sys.argv[1:])
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
    return 0
"""

LOAD = """
import importlib.util, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

target, folder, *revisions = sys.argv[1:]
trust = {"trust_remote_code": True}
if importlib.util.find_spec("hf_cram") is not None:
    import hf_cram
    trust = {}
tokenizer = AutoTokenizer.from_pretrained("me/crammed")
ids = torch.tensor([tokenizer("the old man saw a boat", add_special_tokens=False)["input_ids"]])
logits = {"local": AutoModelForMaskedLM.from_pretrained(folder, **trust)(ids).logits.detach().contiguous()}
for revision in revisions:
    model = AutoModelForMaskedLM.from_pretrained("me/crammed", revision=revision, **trust)
    logits[revision] = model(ids).logits.detach().contiguous()
    AutoModelForSequenceClassification.from_pretrained("me/crammed", revision=revision, **trust)
save_file(logits, target)
"""


@pytest.fixture(scope="module")
def server():
    with running_hub() as server:
        yield server
        assert not [body for body in server.received if TOKEN.encode() in body]  # of all that any test pushes


@pytest.fixture(scope="module")
def environment(server, tmp_path_factory):
    """A machine that is logged in, with this checkout in its path."""
    return logged_in_environment(server.url, TOKEN, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def run(environment, server, tmp_path_factory):
    """Runs a command (a script with its arguments, or `hf_cram.hub`); returns its status and what it wrote."""
    with forked_calls(DRIVER, environment, tmp_path_factory.mktemp("logs")) as call_forked:

        def run_command(*command, endpoint=server.url):
            status, log = call_forked(command=[str(word) for word in command], endpoint=endpoint)
            return status, log.read_text()

        yield run_command


@pytest.fixture(scope="module")
def train(run, tmp_path_factory):
    """Trains a tiny model with `--push_to_hub`; returns status, log and output folder."""
    folder = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, rng.integers(5, 30))) + "." for _ in range(2000)]
    (folder / "text.txt").write_text("\n".join(lines))

    def train_model(name, *more, **options):
        out = folder / name
        text = ["--train_files", folder / "text.txt", "--cache_dir", folder / "cache"]
        pushing = ["--push_to_hub", "true", "--hub_model_id", f"me/{name}", "--output_dir", out]
        status, log = run(REPOSITORY / "run_mlm_cram.py", *text, *SMALL, *pushing, *more, **options)
        return status, log, out

    return train_model


@pytest.fixture(scope="module")
def pushed(train):
    """A run that pushes its checkpoints and its result, with nothing in the way."""
    return train("crammed", "--time_budget", "5s", "--save_interval", "20%", "--save_total_limit", "1",
                 "--logging_interval", "25%", "--hub_private_repo", "true", "--language", "de", "--model_license", "mit")  # fmt: skip


@pytest.fixture
def heal(server):
    yield server.faults.clear
    server.faults.clear()


def test_training_pushes_all_that_can_be_shared_and_nothing_else(pushed, server):
    status, log, out = pushed
    assert status == 0, log
    repository = server.repositories["me/crammed"]
    assert set(repository.files) == CODE | MODEL | RESULTS
    assert repository.private
    assert repository.messages[-1] == "End of training"
    assert f"Pushed to {server.url}/me/crammed" in log
    assert {name: (out / name).read_bytes() for name in repository.files} == repository.files
    assert not (out / hub.PUSHING_NAME).exists()
    card = ModelCard(repository.files["README.md"].decode())
    assert card.data.eval_results[0].metric_type == "loss"
    assert (card.data.language, card.data.license) == ("de", "mit")
    recipe = yaml.safe_load(repository.files["recipe.yaml"])
    assert recipe["hidden_size"] == 32
    assert not [name for name in recipe if "hub" in name or name.endswith("_dir") or name == "train_files"]
    results = json.loads(repository.files["all_results.json"])
    assert results["text_name"] == "text.txt"
    assert "CPU threads" in results["hardware"]
    assert results["num_parameters"] == AutoModelForMaskedLM.from_pretrained(out).num_parameters()


def test_checkpoints_on_the_way_are_whole_models_with_their_code(pushed, server):
    repository = server.repositories["me/crammed"]
    on_the_way = dict(zip(repository.messages, repository.commits.values(), strict=True))
    steps = [message for message in on_the_way if message.startswith("Training in progress, step ")]
    assert steps
    result = load(repository.files["model.safetensors"])
    for message in steps:
        files = on_the_way[message]
        assert set(files) == CODE | MODEL
        auto_map = json.loads(files["config.json"])["auto_map"]
        assert set(auto_map) == {"AutoConfig", *(f"AutoModel{head}" for head in HEADS)}
        assert load(files["model.safetensors"]).keys() == result.keys()
    # The last one may be the result.
    first = load(on_the_way[steps[0]]["model.safetensors"])
    assert not all(torch.equal(tensor, result[name]) for name, tensor in first.items())


def test_only_the_result_is_pushed_where_so_asked(train, server):
    status, log, out = train("at-end", "--max_steps", "4", "--save_interval", "25%", "--hub_strategy", "end")
    assert status == 0, log
    assert (out / "checkpoint-4").is_dir()
    messages = server.repositories["me/at-end"].messages
    assert not [message for message in messages if message.startswith("Training in progress")]
    assert messages[-1] == "End of training"


def test_the_token_is_found_nowhere(pushed, server):
    _, log, out = pushed
    assert TOKEN not in log
    for content in [*server.received, *(path.read_bytes() for path in out.rglob("*") if path.is_file())]:
        assert TOKEN.encode() not in content


@pytest.mark.parametrize("has_package", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_fresh_process_loads_result_and_checkpoint_from_the_hub(pushed, server, environment, tmp_path, has_package):
    repository = server.repositories["me/crammed"]
    steps = [sha for sha, files in repository.commits.items() if set(files) == CODE | MODEL]
    paths = environment["PYTHONPATH"].split(os.pathsep)
    fresh = {
        **environment, "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(paths if has_package else paths[1:]),
    }  # fmt: skip
    target = tmp_path / "logits.safetensors"
    revisions = [repository.head, steps[0]]
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(target), str(pushed[-1]), *revisions],
        env=fresh, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    logits = load_file(target)
    assert torch.equal(logits[repository.head], logits["local"])
    assert not torch.allclose(logits[steps[0]], logits["local"], atol=1e-4)


LASTING = {
    "unauthorised": (Fault("/api/repos/create", 401), "the token is not valid (401): set HF_TOKEN, or run `hf auth"),
    "forbidden": (Fault("/commit/", 403), "the token may not write to me/forbidden (403"),
    "busy": (Fault("/preupload/", 500), "the Hub answers 500"),
    "cut": (Fault("/storage/", CUT), "the Hub cannot be reached ("),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "unauthorised" else [pytest.mark.slow])
                                  for name in LASTING])  # fmt: skip
def test_training_goes_on_under_a_lasting_fault_and_the_command_pushes_later(train, run, server, heal, name):
    fault, cause = LASTING[name]
    server.faults.append(fault)
    status, log, out = train(name, "--time_budget", "4s", "--save_interval", "30%")
    assert status == 0, log
    assert "Traceback" not in log
    last = [line for line in log.splitlines() if "is not pushed to the Hub" in line]
    assert len(last) == 1
    assert cause in last[0]
    # Of the short run's pushes a lasting fault may show at the last one only; a token that is not valid shows at once.
    assert log.count("Training goes on") == 1 if name == "unauthorised" else log.count("Training goes on") <= 1
    assert "Retrying" not in log
    assert json.loads((out / "all_results.json").read_text())["train_seconds"] >= 4
    heal()
    words = shlex.split(COMMAND.search(last[0])[1])
    status, log = run("hf_cram.hub", *words)
    assert status == 0, log
    assert log.splitlines()[-1] == f"{server.url}/me/{name}"
    assert set(server.repositories[f"me/{name}"].files) == CODE | MODEL | RESULTS


def test_training_goes_on_where_there_is_no_hub(train, run):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        status, log, out = train("absent", "--max_steps", "4", endpoint=endpoint)
        assert status == 0, log
        last = next(line for line in reversed(log.splitlines()) if COMMAND.search(line))
        assert REFUSED in last
        assert COMMAND.search(last)[1] == f"{out} --hub_model_id me/absent"
        assert 1 <= log.count(f"hf_cram.hub {out}") <= 2  # at the end, and once at most before it
        status, log = run("hf_cram.hub", out, endpoint=endpoint)
        assert status == 1
        assert log.strip() == f"python -m hf_cram.hub: error: {REFUSED}"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/commit/", 429, times=2, headers={"Retry-After": "1"}),
        Fault("/storage/", CUT, times=7),
        Fault("/preupload/", SILENCE, times=1),
        Fault("/verify", 500, times=7),
        Fault("/commit/", CUT, times=1),
        *(
            pytest.param(fault, marks=pytest.mark.slow)  # the same waiting, at other requests
            for fault in (
                Fault("/api/repos/create", 429, times=2, headers={"Retry-After": "0"}),
                Fault("/api/validate-yaml", 503, times=1),
                Fault("/preupload/", 500, times=3),
                Fault("/storage/", CUT, times=1),
                Fault("/api/repos/create", SILENCE, times=1),
            )
        ),
    ],
    ids=lambda fault: f"{fault.path_part.strip('/').split('/')[-1]}-{fault.status}-{fault.times}",
)
def test_a_passing_fault_is_waited_out(pushed, run, server, heal, fault):
    server.faults.append(fault)
    server.large.clear()
    server.repositories.pop("me/later", None)
    status, log = run("hf_cram.hub", pushed[-1], "--hub_model_id", "later", "--private")
    assert status == 0, log
    assert fault.times == 0
    assert log.strip().splitlines()[-1] == f"{server.url}/me/later"
    assert set(server.repositories["me/later"].files) == CODE | MODEL | RESULTS
    assert server.repositories["me/later"].private


def answer(status, headers=None, told=None):
    """An error of the client for an answer of the Hub."""
    response = httpx2.Response(status, headers=headers, request=httpx2.Request("POST", "http://hub/api/repos/create"))
    return HfHubHTTPError("refused", response=response, server_message=told)


def test_the_hubs_own_reason_is_told():
    failure = explain(
        answer(403, told="Private repository storage limit reached,\nupgrade your plan"), "me/x", None, "id"
    )
    assert "me/x (403, Private repository storage limit reached, upgrade your plan)" in str(failure)
    failure = explain(answer(400, told="bad\ncard"), "me/x", None, "id")
    assert str(failure) == "the Hub refuses the push: bad card (400)"


def test_a_token_that_cannot_be_sent_is_not_told():
    errors = [httpx2.LocalProtocolError(f"Illegal header value b'Bearer {TOKEN}\\x1b[201~'")]
    with pytest.raises(UnicodeEncodeError) as pasted:
        httpx2.Headers({"Authorization": f"Bearer \u201c{TOKEN}\u201d"})
    for error in (*errors, pasted.value):
        failure = explain(error, "me/x", None, "hub_model_id")
        assert failure.is_final
        assert TOKEN not in str(failure)
        assert "set HF_TOKEN anew" in str(failure)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://user:pa#ss@proxy:8080"])
def test_a_proxy_that_cannot_be_is_one_line(monkeypatch, proxy):
    if proxy.startswith("socks") and importlib.util.find_spec("socksio"):
        pytest.skip("socksio is installed, with which this proxy can be")
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", "")
    for name in ("all_proxy", "no_proxy", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(HubError, match="socksio|look at ALL_PROXY and HTTPS_PROXY") as caught:
        with_retries(get_session, "me/x", None, "hub_model_id")
    assert "\n" not in str(caught.value)
    assert "pa" not in str(caught.value).split("proxy")[0]
    assert caught.value.is_final


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"Retry-After": "7"}, 7.0),
        (429, {"ratelimit": '"api";r=0;t=55'}, 55.0),
        (429, {"ratelimit": '"api";r=0;t=9999'}, 300.0),
        (503, {"ratelimit": '"api";r=489;t=189'}, 0.0),  # which comes with every answer
        (429, {}, 0.0),
    ],
)
def test_a_hub_that_asks_for_patience_is_given_it(status, headers, seconds):
    failure = explain(answer(status, headers), "me/x", None, "hub_model_id")
    assert (failure.is_final, failure.retry_after_seconds) == (False, seconds)


def test_a_checkpoint_can_be_pushed_by_the_command(pushed, run, server):
    (checkpoint,) = pushed[-1].glob("checkpoint-*")
    status, log = run("hf_cram.hub", checkpoint)
    assert status == 0, log
    # It goes to that of the run, whose weights it has: the scores stay.
    assert set(server.repositories["me/crammed"].files) == CODE | MODEL | RESULTS
    assert log.strip().splitlines()[-1] == f"{server.url}/me/crammed"


def test_scores_leave_the_hub_with_their_weights_only(pushed, run, server, tmp_path):
    model = shutil.copytree(pushed[-1], tmp_path / "scores", ignore=shutil.ignore_patterns("checkpoint-*"))
    scores = [model / "glue_results.json", model / ".eval_results/glue.yaml"]
    for path in scores:
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    assert run("hf_cram.hub", model)[0] == 0
    for path in scores:
        path.unlink()
    # Scores that were pushed from elsewhere: the weights are the same.
    assert run("hf_cram.hub", model)[0] == 0
    assert {"glue_results.json", ".eval_results/glue.yaml"} < set(server.repositories["me/scores"].files)
    (model / "model.safetensors").write_bytes(b"others")
    assert run("hf_cram.hub", model)[0] == 0
    assert set(server.repositories["me/scores"].files) == CODE | MODEL | RESULTS
    # As of a checkpoint on the way, which has no card.
    for name in RESULTS:
        (model / name).unlink()
    (model / "model.safetensors").write_bytes(b"later ones")
    assert run("hf_cram.hub", model)[0] == 0
    assert set(server.repositories["me/scores"].files) == CODE | MODEL


def test_a_branch_is_made_where_it_is_absent(pushed, run, server):
    (checkpoint,) = pushed[-1].glob("checkpoint-*")
    for _ in range(2):
        status, log = run("hf_cram.hub", checkpoint, "--hub_model_id", "branched", "--hub_revision", "dev")
        assert status == 0, log
    repository = server.repositories["me/branched"]
    assert set(repository.at("dev")[1]) == CODE | MODEL
    assert repository.files == {}


def test_glue_results_and_card_are_pushed_with_the_model(pushed, run, server, tmp_path):
    model, data = tmp_path / "model", tmp_path / "glue" / "wnli"
    shutil.copytree(pushed[-1], model, ignore=shutil.ignore_patterns("checkpoint-*"))
    data.mkdir(parents=True)
    rows = {"sentence1": ["the old man saw a boat"] * 8, "sentence2": ["a boat went home"] * 8, "label": [0, 1] * 4}
    for split in ("train", "validation"):
        Dataset.from_dict(rows).to_parquet(data / f"{split}-00000-of-00001.parquet")
    status, log = run(
        REPOSITORY / "run_glue.py", "--model_name_or_path", model, "--glue_data", data.parent, "--seeds", "1", "--bf16",
        "false", "--num_train_epochs", "1", "--push_to_hub", "true", "--hub_model_id", "me/scored",
    )  # fmt: skip
    assert status == 0, log
    files = server.repositories["me/scored"].files
    assert set(files) == CODE | MODEL | RESULTS | {"glue_results.json", "glue_results.png", ".eval_results/glue.yaml"}
    assert json.loads(files["glue_results.json"])["model"] == "model"
    results = ModelCard(files["README.md"].decode()).data.eval_results
    assert {result.dataset_name for result in results if result.metric_type == "accuracy"} == {"GLUE WNLI"}
    assert TOKEN not in log


def test_a_model_of_own_data_is_pushed_by_the_name_of_its_folder(pushed, run, server, tmp_path):
    rows = {"text": ["the old man saw a boat", "a boat went home"] * 8, "label": ["good", "bad"] * 8}
    Dataset.from_dict(rows).to_csv(tmp_path / "train.csv")
    files = ["--train_file", tmp_path / "train.csv", "--validation_file", tmp_path / "train.csv"]
    status, log = run(
        REPOSITORY / "run_glue.py", "--model_name_or_path", pushed[-1], *files, "--output_dir", tmp_path / "reviews",
        "--seeds", "1", "--bf16", "false", "--num_train_epochs", "1", "--push_to_hub", "true",
    )  # fmt: skip
    assert status == 0, log
    files = server.repositories["me/reviews"].files
    assert set(files) >= CODE | MODEL | {"README.md", "glue_results.json"}
    assert ModelCard(files["README.md"].decode()).data.pipeline_tag == "text-classification"


@pytest.mark.parametrize("mistake", ["no folder", "no model", "only checkpoints", "bad name", "bad card"])
def test_a_users_mistake_is_one_line(pushed, run, tmp_path, mistake):
    folder, more, message = tmp_path / "out", [], {
        "no folder": "there is no folder", "no model": "name the output folder of a finished run",
        "only checkpoints": "name its checkpoint", "bad name": "a b", "bad card": "Invalid metadata in README.md",
    }[mistake]  # fmt: skip
    if mistake != "no folder":
        folder.mkdir()
    if mistake == "only checkpoints":
        shutil.copytree(next(pushed[-1].glob("checkpoint-*")), folder / "checkpoint-3")
    if mistake in ("bad name", "bad card"):
        shutil.copytree(pushed[-1], folder, dirs_exist_ok=True)
    if mistake == "bad name":
        more = ["--hub_model_id", "a b"]
    if mistake == "bad card":
        (folder / "README.md").write_text("---\nlanguage: [en\n---\n")
    status, log = run("hf_cram.hub", folder, *more)
    assert status == 1
    (line,) = log.strip().splitlines()
    assert line.startswith("python -m hf_cram.hub: error: ")
    assert message in line


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "python -m hf_cram.hub: stopped"),
        (OSError(36, "File name too long", "x"), 1, "python -m hf_cram.hub: error: x: "),
    ],
)
def test_what_stops_a_push_is_one_line(monkeypatch, capsys, tmp_path, fault, status, said):
    def stop(*_):
        raise fault

    monkeypatch.setattr(hub, "push_folder", stop)
    with pytest.raises(SystemExit) as caught:
        hub.main([str(tmp_path)])
    told = capsys.readouterr().err if status == 130 else str(caught.value.code)
    assert told.startswith(said)
    assert told.strip().count("\n") == 0


def write_model(folder, weights=b"weights"):
    folder.mkdir(parents=True)
    auto_map = {"AutoModel": "modeling_x.X", "AutoTokenizer": "someone/else--tokenization_x.X"}
    (folder / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "modeling_x.py").write_text("from .layers_x import Layer\n")
    (folder / "layers_x.py").write_text("Layer = 1\n")


def test_only_files_of_the_model_are_shareable(tmp_path):
    folder = tmp_path / "model"
    write_model(folder)
    names = ["model_of_a_friend.safetensors", "model-final.safetensors", "training_args.bin", "cram_state.json", "clock.json", "trainer_state.json", "my_script.py", ".env",
             "optimizer.pt", "rng_state.pth", "pytorch_model.bin", "notes.png", "README.md", "predictions.zip"]  # fmt: skip
    for name in names:
        (folder / name).touch()
    for name in ("checkpoint-5", ".saving", ".pushing", "cola", ".eval_results"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").touch()
    (folder / ".eval_results" / "glue.yaml").touch()
    assert shareable_files(folder) == [".eval_results/glue.yaml", "README.md", "config.json", "layers_x.py",
                                       "model.safetensors", "modeling_x.py"]  # fmt: skip


@pytest.mark.parametrize(
    "auto_map", ['{"AutoModel": "/etc/passwd.X"}', '{"AutoTokenizer": [null, "tokenization_x.X"]}']
)
def test_references_that_are_no_file_of_the_folder(tmp_path, auto_map):
    write_model(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(f'{{"auto_map": {auto_map}}}')
    assert shareable_files(tmp_path / "model") == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["layers_x.py", "config.json"])
def test_a_model_that_lacks_code_is_one_line(tmp_path, name):
    write_model(tmp_path / "model")
    if name == "config.json":
        (tmp_path / "model" / name).write_text("[]")
    else:
        (tmp_path / "model" / name).unlink()
    with pytest.raises(HubError, match="config.json, or code it names, cannot be read"):
        shareable_files(tmp_path / "model")


def test_command_survives_a_shell():
    target = HubTarget("me/x", private=True, revision="dev")
    assert shlex.split(target.command("/a folder/out"))[3:] == [
        "/a folder/out", "--hub_model_id", "me/x", "--private", "--hub_revision", "dev",
    ]  # fmt: skip


def test_training_never_waits_and_the_newest_checkpoint_is_pushed_next(tmp_path, monkeypatch):
    entered, release, uploads = threading.Event(), threading.Event(), queue.Queue()

    def slow_push(folder, target, message, wait=None):
        entered.set()
        assert release.wait(10)
        uploads.put((message, (folder / "model.safetensors").read_bytes()))
        return "address"

    monkeypatch.setattr(hub, "_create_repository", lambda target: "me/x")
    monkeypatch.setattr(hub, "push_folder", slow_push)
    pusher = HubPusher(tmp_path, HubTarget("me/x"))
    for step in (1, 2, 3):
        checkpoint = tmp_path / f"checkpoint-{step}"
        write_model(checkpoint, weights=b"%d" % step)
        pusher.push_checkpoint(checkpoint)
        shutil.rmtree(checkpoint)  # rotated away while the upload hangs
        assert entered.wait(10)
    assert uploads.empty()
    release.set()
    assert uploads.get(timeout=10) == ("Training in progress, step 1", b"1")
    assert uploads.get(timeout=10) == ("Training in progress, step 3", b"3")
    write_model(tmp_path / "result", weights=b"result")
    assert pusher.finish(tmp_path / "result", "End of training")
    assert uploads.get(timeout=10) == ("End of training", b"result")
    assert uploads.empty()
    assert not (tmp_path / hub.PUSHING_NAME).exists()


def test_ctrl_c_in_the_last_push_leaves_the_command(tmp_path, monkeypatch, caplog):
    write_model(tmp_path / "out")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "push_folder", interrupt)
    assert not hub.push_or_warn(tmp_path / "out", HubTarget("me/x"), "End of training")
    assert "Push it with: python -m hf_cram.hub" in caplog.text


def test_a_result_is_not_pushed_beneath_a_checkpoint_that_is_late(tmp_path, monkeypatch, caplog):
    entered, release, pushed = threading.Event(), threading.Event(), []

    def stuck_push(folder, target, message, wait=None):
        pushed.append(message)
        entered.set()
        assert release.wait(10)
        return "address"

    monkeypatch.setattr(hub, "_create_repository", lambda target: "me/x")
    monkeypatch.setattr(hub, "push_folder", stuck_push)
    monkeypatch.setattr(hub, "FINISH_SECONDS", 0.1)
    target = HubTarget("me/x")
    pusher = HubPusher(tmp_path, target)
    write_model(tmp_path / "checkpoint-1")
    pusher.push_checkpoint(tmp_path / "checkpoint-1")
    assert entered.wait(10)
    assert not pusher.finish(tmp_path / "result", "End of training")
    assert f"Push it with: {target.command(tmp_path / 'result')}" in caplog.text
    release.set()
    pusher._thread.join(10)
    assert pushed == ["Training in progress, step 1"]


def test_a_run_that_is_refused_its_folder_leaves_what_another_pushes(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_create_repository", lambda target: "me/x")
    waiting = tmp_path / hub.PUSHING_NAME / "1-checkpoint-1"
    write_model(waiting)
    pusher = HubPusher(tmp_path, HubTarget("me/x"))  # made before a run knows whether it may have the folder
    assert waiting.is_dir()
    monkeypatch.setattr(hub, "push_folder", lambda *args: "address")
    write_model(tmp_path / "checkpoint-7")
    pusher.push_checkpoint(tmp_path / "checkpoint-7")  # has it, so the other was killed
    assert not waiting.exists()
    pusher.finish(tmp_path / "checkpoint-7", "End of training")


def test_unreadable_checkpoint_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hub, "_create_repository", lambda target: "me/x")
    pusher = HubPusher(tmp_path, HubTarget("me/x"))
    pusher.push_checkpoint(tmp_path / "checkpoint-1")
    assert "there is no folder" in caplog.text
    monkeypatch.setattr(hub, "push_folder", lambda *args: (_ for _ in ()).throw(HubError("no way")))
    assert not pusher.finish(tmp_path, "End of training")
    assert caplog.records[-1].getMessage().startswith(f"{tmp_path} is not pushed to the Hub: no way. Push it with: ")
