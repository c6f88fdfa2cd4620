"""Who may import whom."""

import ast

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "hf_cram"
# A module may import those of lower layers, and data modules each other.
LAYERS = [
    {
        "version",
        "files",
        "configuration_crammed_bert",
        "paper_results",
        "markup",
        "glue_metric",
        "hub_errors",
        "programs",
        "out_of_memory",
        "data",
    },
    {
        "modeling_crammed_bert",
        "model_files",
        "budget",
        "optimization",
        "hardware",
        "kept_state",
        "launching",
        "row_stream",
        "hub",
        "minimal_pair_sources",
    },
    {
        "checkpointing",
        "callbacks",
        "embedding_initialization",
        "shapes",
        "training_args",
        "convert_cramming_checkpoint",
        "glue",
        "training_memory",
        "pseudo_likelihood",
    },
    {"output_folder", "hardware_choices", "resuming"},
    {"trainer", "recipes", "fine_tuning_args", "glue_args", "glue_data", "glue_outputs"},
    {"script_args", "classifier", "glue_encoding", "glue_folder"},
    {"fine_tuning", "model_card", "report", "text_budget", "memory"},
    {"glue_run", "minimal_pairs", "plan", "prepare"},
]
ALONE = {"model_card", "report"}  # take plain dicts


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(name.name.split(".")[0] == "hf_cram" for name in node.names), path.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level or node.module.split(".")[0] != "hf_cram", f"{path.name} does not import relatively"
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.level, (node.module or "").split(".")[0]


def test_modules_import_lower_layers_only():
    layer_of = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    for path in PACKAGE.glob("*.py"):
        if path.stem == "__init__":
            continue
        for level, imported in imports_of(path):
            assert level == 1
            assert layer_of[imported] < layer_of[path.stem], f"{path.name} imports {imported}"
            assert path.stem not in ALONE or imported in ("paper_results", "files", "markup", "programs")


def test_data_knows_nothing_of_models_and_training():
    for path in (PACKAGE / "data").glob("*.py"):
        for level, imported in imports_of(path):
            # Run as programs with `python -m`, these two read recipes.
            is_program = path.name in ("pipeline.py", "scale.py") and imported == "prepare"
            assert level == 1 or imported in ("files", "hub_errors", "markup") or is_program, (
                f"{path.name} imports {imported}"
            )


def test_no_module_reads_pickles_or_runs_foreign_code():
    for path in [*PACKAGE.rglob("*.py"), REPOSITORY / "run_mlm_cram.py", REPOSITORY / "run_glue.py"]:
        source = path.read_text().replace("from pickle import UnpicklingError", "")  # what torch.load raises
        for forbidden in ("pickle", "trust_remote_code=True", "weights_only=False", "eval(", "exec("):
            assert forbidden not in source.replace(".eval()", ""), f"{path.name}: {forbidden}"
