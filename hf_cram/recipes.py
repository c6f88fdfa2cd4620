"""Recipes: YAML files of dataclass fields, which the command line overrides."""

import json
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

import yaml
from transformers import HfArgumentParser, PreTrainedConfig

from .configuration_crammed_bert import CrammedBertConfig
from .data.errors import nearest

# Follow from the tokenizer.
TOKENIZER_FIELDS = ("vocab_size", "pad_token_id")


def _plain_type(annotation: Any) -> Any:
    """`float | int` as `float`: a parser converts to one type."""
    return float if set(get_args(annotation)) == {float, int} and get_origin(annotation) is not None else annotation


ModelArguments = make_dataclass(
    "ModelArguments",
    [
        (spec.name, _plain_type(spec.type), field(default=spec.default, metadata={"help": "See CrammedBertConfig."}))
        for spec in fields(CrammedBertConfig)
        if spec.name in CrammedBertConfig.__annotations__ and spec.name not in TOKENIZER_FIELDS
    ],
)
ModelArguments.__doc__ = "Every field of [`CrammedBertConfig`] but those that follow from the tokenizer."


class RecipeParser(HfArgumentParser):
    """
    Parses `[RECIPE.yaml ...] [--field value ...]` into dataclasses; a mistake is one line that names the key.

    `given` holds what the recipes and the command line set, after [`parse`].
    """

    given: dict[str, Any]

    def __init__(self, dataclass_types: Any, **kwargs: Any):
        # An option that is almost one of ours is a mistake, not a short form.
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """
        The dataclasses, filled from the recipes named first (if any) and the flags after them.

        Of several recipes a later one overrides the keys that it names: a model and its training, then another text.

        Exits with status 2 and one line for a recipe that cannot be read, an unknown key (naming the nearest valid
        one) or a value of the wrong type.
        """
        arguments = list(arguments)
        self.given = {}
        if arguments and not arguments[0].startswith("-"):
            self.set_defaults(**self._read_recipe(Path(arguments.pop(0))))
            while arguments and arguments[0].endswith((".yaml", ".yml")):
                self.set_defaults(**self._read_recipe(Path(arguments.pop(0))))
        try:
            *dataclasses, unknown = self.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        except ValueError as error:
            self.error(str(error))
        for flag in unknown:
            if flag.startswith("--"):
                self.error(f"unknown option {flag}{self._nearest(flag.lstrip('-').split('=')[0])}")
            self.error(f"unexpected argument {flag!r}: options are written --name value")
        flags = {argument.lstrip("-").split("=")[0] for argument in arguments if argument.startswith("--")}
        values = {spec.name: getattr(part, spec.name) for part in dataclasses for spec in fields(part)}
        self.given.update({name: values[name] for name in sorted(flags & values.keys())})
        return tuple(dataclasses)

    def _read_recipe(self, path: Path) -> dict[str, Any]:
        try:
            recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            self.error(f"recipe {path} cannot be read: {error.strerror}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}")
        if not isinstance(recipe, dict):
            self.error(f"recipe {path} must hold 'key: value' lines")
        actions = {action.dest: action for action in self._actions}
        defaults = {}
        for key, value in recipe.items():
            if key not in actions:
                self.error(f"recipe {path}: unknown key {key!r}{self._nearest(str(key))}")
            if isinstance(value, dict):
                value = json.dumps(value, default=str)  # YAML takes 2024-01-01 for a date
            takes_list = actions[key].nargs in ("+", "*")
            if isinstance(value, list) != takes_list and value is not None:
                self.error(f"recipe {path}: {key} must be {'a list' if takes_list else 'one value'}, got {value!r}")
            if takes_list:
                defaults[key] = value
            else:
                # A string default goes through the same conversion as the command line, 1e-3 included.
                defaults[key] = None if value is None else str(value)
            self._check_choice(path, key, defaults[key], actions[key])
            self.given[key] = value
            # A key of the recipe stands in for a required flag.
            actions[key].required = False
        return defaults

    def _check_choice(self, path: Path, key: str, value: Any, action: Any) -> None:
        if (
            action.choices is not None
            and value is not None
            and value not in [str(choice) for choice in action.choices]
        ):
            self.error(f"recipe {path}: {key} must be one of {', '.join(map(str, action.choices))}, got {value!r}")

    def _nearest(self, name: str) -> str:
        valid = [action.dest for action in self._actions if action.dest != "help"]
        return nearest(name, valid)


def build_config(arguments: Any, tokenizer: Any) -> PreTrainedConfig:
    """The model's configuration from its arguments and the tokenizer it will read."""
    values = {spec.name: getattr(arguments, spec.name) for spec in fields(arguments)}
    return CrammedBertConfig(**values, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
