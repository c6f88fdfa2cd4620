"""Recipes: YAML files of dataclass fields, which the command line overrides."""

import json
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import asdict, field, fields, make_dataclass
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, PreTrainedConfig
from transformers.activations import ACT2FN

from .configuration_crammed_bert import CrammedBertConfig
from .data.errors import nearest

# Follow from the tokenizer.
TOKENIZER_FIELDS = ("vocab_size", "pad_token_id", "mask_token_id")
DIGITS = re.compile(r"[+-]?\d[\d_]*(\.\d*)?")


def _plain_type(annotation: Any) -> Any:
    """`float | int` as `float`: a parser converts to one type."""
    return float if set(get_args(annotation)) == {float, int} and get_origin(annotation) is not None else annotation


def _check_model(arguments: Any) -> None:
    """Raises `ValueError` for a model that cannot be built, before any text is prepared for it."""
    values = asdict(arguments)
    for name in ("hidden_act", "classifier_activation"):
        if values[name] not in ACT2FN:
            raise ValueError(f"{name}: unknown activation {values[name]!r}{nearest(values[name], ACT2FN)}")
    for name in values:
        if "dropout" in name and not 0 <= values[name] <= 1:
            raise ValueError(f"{name} is a share from 0 to 1, got {values[name]}")
    try:
        CrammedBertConfig(**values)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def _help_of_fields(docstring: str) -> dict[str, str]:
    """What `name (`type`): text` of a docstring says of each name, in one line each."""
    entries = re.findall(r"^ +(\w+) \(`.*\):\s+((?:(?! *\w+ \(`).+\n?)+)", docstring, re.MULTILINE)
    return {name: " ".join(text.split()).replace("%", "%%") for name, text in entries}


_HELP = _help_of_fields(CrammedBertConfig.__doc__ or "")

ModelArguments = make_dataclass(
    "ModelArguments",
    [
        (spec.name, _plain_type(spec.type), field(default=spec.default, metadata={"help": _HELP.get(spec.name, "")}))
        for spec in fields(CrammedBertConfig)
        if spec.name in CrammedBertConfig.__annotations__ and spec.name not in TOKENIZER_FIELDS
    ],
    namespace={"__post_init__": _check_model},
)
ModelArguments.__doc__ = "Every field of [`CrammedBertConfig`] but those that follow from the tokenizer."


def _value_or_none(kind: type) -> Callable[[str], Any]:
    """The conversion of an optional value: `none` on the command line is what null is in a recipe."""

    @wraps(kind, updated=())
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    return convert


def _spell(digits: str) -> str:
    """A number as Python writes it."""
    digits = digits.replace("_", "")
    return str(float(digits) if "." in digits else int(digits))


class RecipeLoader(yaml.SafeLoader):
    """
    YAML in which a key that stands twice is an error: one of its values would be lost. What YAML 1.1 takes for a number of
    base 60 (24:00) or a date (2024-01-01) stays text, as does a number that would not be written as it was (1.10, 0123456).
    """

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: tuple[bool, bool] | bool) -> str:
        tag = super().resolve(kind, value, implicit)
        is_number = tag.endswith((":int", ":float"))
        is_base_60 = is_number and ":" in str(value)
        # 1.10 and 0123456 may be names; what they are as numbers a field of numbers finds out.
        is_spelled = is_number and DIGITS.fullmatch(str(value)) and str(value) != _spell(str(value))
        return "tag:yaml.org,2002:str" if is_base_60 or is_spelled or tag.endswith(":timestamp") else tag

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        names = [key.value for key, _ in pairs]
        for key, _ in pairs:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


class RecipeParser(HfArgumentParser):
    """
    Parses `[RECIPE.yaml ...] [--field value ...]` into dataclasses; a mistake is one line that names the key.

    `given` holds what the recipes and the command line set, after [`parse`].
    """

    given: dict[str, Any]

    def __init__(self, dataclass_types: Any, **kwargs: Any):
        # An option that is almost one of ours is a mistake, not a short form.
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        hints = {name: hint for part in self.dataclass_types for name, hint in get_type_hints(part).items()}
        self._may_be_null = {
            action.dest
            for action in self._actions
            if action.default is None or NoneType in get_args(hints.get(action.dest))
        }

        for action in self._actions:
            kinds = set(get_args(hints.get(action.dest)))
            # Not where another kind is optional too: `none` means something to report_to.
            is_plain = action.type in (int, float) or kinds == {str, NoneType}
            if NoneType in kinds and is_plain and isinstance(action.type, type):
                action.type = _value_or_none(action.type)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

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
        # Before the dataclasses look at their values, which a misspelt option leaves at the default.
        for flag in self.parse_known_args(arguments)[1]:
            if flag.startswith("--"):
                self.error(f"unknown option {flag}{self._nearest(flag.lstrip('-').split('=')[0])}")
            if flag.endswith((".yaml", ".yml")):
                self.error(f"unexpected argument {flag!r}: recipes stand before the options")
            self.error(f"unexpected argument {flag!r}: options are written --name value")
        try:
            dataclasses = self.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        except ValueError as error:
            self.error(str(error))
        # Every spelling counts: --learning_rate, --learning-rate, --no_final_norm.
        options = [self._option_string_actions.get(argument.split("=")[0]) for argument in arguments]
        flags = {action.dest for action in options if action is not None}
        values = {spec.name: getattr(part, spec.name) for part in dataclasses for spec in fields(part)}
        self.given.update({name: values[name] for name in sorted(flags & values.keys())})
        return tuple(dataclasses)

    def _read_recipe(self, path: Path) -> dict[str, Any]:
        try:
            recipe = yaml.load(path.read_text(encoding="utf-8"), Loader=RecipeLoader)
        except OSError as error:
            self.error(f"recipe {path} cannot be read: {error.strerror}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}")
        if not isinstance(recipe, dict):
            self.error(f"recipe {path} must hold 'key: value' lines")
        actions = {action.dest: action for action in self._actions if action.dest != "help"}
        defaults: dict[str, Any] = {}
        for key, value in recipe.items():
            if key not in actions:
                self.error(f"recipe {path}: unknown key {key!r}{self._nearest(str(key))}")
            if value is None and key not in self._may_be_null:
                self.error(f"recipe {path}: {key} needs a value; without its line it is {actions[key].default!r}")
            if isinstance(value, dict):
                value = json.dumps(value)
            if value is False and "no" in map(str, actions[key].choices or ()):
                value = "no"  # which YAML takes for false
            takes_list = actions[key].nargs in ("+", "*")
            if isinstance(value, list) and not takes_list:
                self.error(f"recipe {path}: {key} must be one value, got {value!r}")
            if value is None:
                defaults[key] = None
            elif takes_list:
                defaults[key] = self._convert_list(path, actions[key], value if isinstance(value, list) else [value])
            else:
                # A string default goes through the same conversion as the command line, 1e-3 included.
                defaults[key] = str(value)
            self._check_choice(path, key, defaults[key], actions[key])
            self.given[key] = defaults[key] if takes_list else value
            # A key of the recipe stands in for a required flag.
            actions[key].required = False
        return defaults

    def _convert_list(self, path: Path, action: Any, values: list[Any]) -> list[Any]:
        """The items of a list as the command line would convert them."""
        for value in values:
            if value is None or isinstance(value, list | dict):
                self.error(f"recipe {path}: {action.dest} must be a list of plain values, got {values!r}")
        try:
            return [action.type(str(value)) for value in values]
        except (ValueError, ArgumentTypeError):
            self.error(f"recipe {path}: {action.dest} must be a list of {action.type.__name__}, got {values!r}")

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
    return CrammedBertConfig(
        **asdict(arguments),
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id if arguments.neighbour_table_entries else None,  # nothing else reads it
    )
