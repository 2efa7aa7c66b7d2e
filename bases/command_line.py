"""Options: a command's flags, their help and their other sources, such as the environment, in one frozen model.

A model derives from :class:`Options`. :func:`command` makes the typer command from its fields, so a new option is a new
field: the name becomes the flag, the annotation the type in the help, the description the help text. What is given on
the command line wins over the model's other sources (environment, YAML).
"""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from bases.errors import ConfigError, ManyloraError
from bases.pydantic_errors import message_with_value

if TYPE_CHECKING:
    import typer

APP: Mapping[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
"""Arguments of every typer app."""
Given = dict[str, Any]
"""Field -> value on the command line: a str, a tuple of them, or a bool. Only fields that were given."""
_WORDS = {int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT", SecretStr: "TEXT"}
LONGEST_CHOICES = 20
"""With more characters than this, the choices of an option are listed in its description."""
_ENDINGS = {"_gib": "GIB", "_mib": "MIB", "_seconds": "SECONDS", "url": "URL", "timeout": "SECONDS"}
"""End of a field's name -> its metavar in the help, where that says more than the type."""


class Options(BaseSettings):
    """Options of a command. Raises :attr:`error` for bad values, with one line for each."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    error: ClassVar[type[ManyloraError]] = ConfigError
    """Raised for bad values."""
    positional: ClassVar[str | None] = None
    """The field that takes the arguments without a flag."""
    panels: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Headings of the help, each with its fields in order. Fields that are in none come last, under "Options"."""
    metavars: ClassVar[Mapping[str, str]] = {}
    """What the help calls a field's value, where type and name do not say it."""
    old_flags: ClassVar[Mapping[str, str]] = {}
    """Field -> its flag in earlier versions, which is still accepted."""

    def __init__(self, _places: Mapping[str, str] | None = None, **values: Any) -> None:
        """Take values from keyword arguments, then from the model's other sources; never from ``sys.argv``.

        ``_places`` has the names for error messages of fields that were not given by their flags.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            # The first error of each option: others may follow from it.
            lines: dict[object, str] = {}
            for detail in error.errors():
                lines.setdefault(detail["loc"][:1] or len(lines), self.error_line(detail, _places or {}))
            raise self.error("\n".join(lines.values())) from None
        except SettingsError as error:
            raise self.error(str(error)) from None

    @classmethod
    def error_line(cls, detail: ErrorDetails, places: Mapping[str, str]) -> str:
        """Describe one of pydantic's errors, as ``--max-rank: must be at least 1 (got 0)``."""
        if not detail["loc"]:
            return str(detail["ctx"]["error"])
        name, *inside = map(str, detail["loc"])
        return message_with_value(detail, ".".join([places.get(name, cls.flag(name)), *inside]))

    @classmethod
    def flag(cls, field: str) -> str:
        """``"max_rank"`` -> ``"--max-rank"``, ``"r"`` -> ``"-r"``; the positional field in capitals."""
        if field == cls.positional:
            return field.upper()
        info = cls.model_fields.get(field)
        name = (info.alias if info is not None and info.alias else field).replace("_", "-")
        return f"-{name}" if len(name) == 1 else f"--{name}"

    @classmethod
    def other_sources(cls) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources of values that were not given, the most important first. None by default.

        So pydantic does not read a variable called NAME or SEED, which was not meant for this program.
        """
        return ()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return keyword arguments, then :meth:`other_sources`."""
        return (init_settings, *cls.other_sources())


def command(options: type[Options], run: Callable[[Given], int], doc: str) -> Callable[..., int]:
    """Make a function for ``typer.Typer.command`` (or ``callback``) that calls ``run`` with the given values.

    ``run`` returns the exit status. ``doc`` is the command's help.
    """
    import typer

    def call(context: typer.Context, **values: Any) -> int:
        if context.invoked_subcommand is not None:
            return 0
        given = {name: value for name, value in values.items() if _was_given(context, name)}
        return run({name: _joined(options, name, value) for name, value in given.items()})

    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    parameters += [_parameter(options, field, panel) for panel, fields in _by_panel(options) for field in fields]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    call.__doc__ = doc
    return call


def single_command(options: type[Options], run: Callable[[Given], int], doc: str | None = None) -> "typer.Typer":
    """Make a typer app of one command. ``doc`` is its help, by default the model's docstring."""
    import typer

    app = typer.Typer(**APP)
    app.command()(command(options, run, doc or options.__doc__ or ""))
    return app


def parse(options: type[Options], words: Sequence[str], program: str) -> Given:
    """Parse arguments. Prints the help and raises SystemExit for ``--help``; raises the options' error."""
    import typer

    found: list[Given] = []

    def keep(given: Given) -> int:
        found.append(given)
        return 0

    try:
        run = plain_help(typer.main.get_command(single_command(options, keep)))
        run(list(words), prog_name=program, standalone_mode=False)
    except typer.TyperException as error:
        raise options.error(usage_error(error)) from None
    if not found:
        raise SystemExit(0)
    return found[0]


def plain_help(command: Any) -> Any:
    """Return a click command after removing Python's types from its help and that of its sub-commands.

    Also leaves out ``--no-NAME`` beside ``--NAME``, which would take half of the width: descriptions mention it.
    """
    get_params, format_help = command.get_params, command.format_help

    def without_types(context: "typer.Context") -> list[Any]:
        params: list[Any] = get_params(context)
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
            if param.param_type_name == "argument":
                param.display_type_rich = lambda ctx: None
                param._get_number_range_help_str = lambda: None
        return params

    def without_negatives(context: "typer.Context", formatter: Any) -> None:
        negatives = [(param, param.secondary_opts) for param in command.params]
        for param, _ in negatives:
            param.secondary_opts = []
        try:
            format_help(context, formatter)
        finally:
            for param, flags in negatives:
                param.secondary_opts = flags

    command.get_params, command.format_help = without_types, without_negatives
    for subcommand in getattr(command, "commands", {}).values():
        plain_help(subcommand)
    return command


def usage_error(error: "typer.TyperException") -> str:
    """Describe a usage error, as ``--nix: there is no such option``. Omits values: one may be an API key."""
    option = getattr(error, "option_name", None)
    kind = type(error).__name__
    if kind == "NoSuchOption":
        context = getattr(error, "ctx", None)
        known = [flag for each in (context.command.params if context else ()) for flag in each.opts]
        near = get_close_matches(str(option), known, n=1, cutoff=0.7)
        return f"{option}: there is no such option" + (f"; did you mean {near[0]}?" if near else "; see --help")
    if kind == "BadOptionUsage":
        takes_none = "does not take" in str(error)
        return f"{option}: takes no value" if takes_none else f"{option}: needs a value"
    message = str(getattr(error, "format_message", lambda: str(error))()).rstrip(".")
    if message.startswith("Got unexpected extra argument"):
        words = message.partition(" (")[2].removesuffix(")")
        return f"there is no option or command {words!r}; options begin with --"
    return message.replace("No such command", "there is no command")


def _was_given(context: "typer.Context", name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _by_panel(options: type[Options]) -> list[tuple[str, list[str]]]:
    rest = [name for name in options.model_fields if not any(name in fields for fields in options.panels.values())]
    return [*((title, list(fields)) for title, fields in options.panels.items()), ("Options", rest)]


def _parameter(options: type[Options], field: str, panel: str) -> inspect.Parameter:
    """Make a typer parameter of a field. Values stay text: pydantic validates them like those of other sources."""
    import typer
    from rich.markup import escape

    info = options.model_fields[field]
    kind = _plain(info.annotation)
    default = _default(info)
    text = info.description or ""
    if len(_choices(kind)) > LONGEST_CHOICES:
        *others, last = get_args(kind)
        text += f" ({', '.join(others)} or {last})"
    if default:
        text += f" [default: {default}]"
    shared: dict[str, Any] = {"help": escape(text), "metavar": _metavar(options, field), "rich_help_panel": panel}
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if choices:
        shared["autocompletion"] = lambda: [str(choice) for choice in choices]
    annotation: Any
    if field == options.positional:
        annotation = Annotated[list[str] | None, typer.Argument(show_default=False, hidden=True, **shared)]
    elif kind is bool:
        name = options.flag(field)
        both = name if info.default is False else f"{name}/--no-{name[2:]}"
        annotation = Annotated[bool | None, typer.Option(both, show_default=False, **shared)]
    else:
        value = list[str] if _takes_several(kind) else str
        flags = [options.flag(field), *([options.old_flags[field]] if field in options.old_flags else [])]
        annotation = Annotated[value | None, typer.Option(*flags, show_default=False, **shared)]
    return inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain(annotation: Any) -> Any:
    """Return the type without ``Annotated`` and ``| None``."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _plain(next(each for each in get_args(annotation) if each is not type(None)))
    return annotation


def _choices(kind: Any) -> str:
    """``"nf4|none"`` for ``Literal["nf4", "none"]``; empty for other types."""
    return "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else ""


def _takes_several(kind: Any) -> bool:
    return get_origin(kind) in (tuple, dict)


def _metavar(options: type[Options], field: str) -> str:
    if field in options.metavars:
        return options.metavars[field]
    kind = _plain(options.model_fields[field].annotation)
    if choices := _choices(kind):
        return choices if len(choices) <= LONGEST_CHOICES else field.upper()
    for ending, word in _ENDINGS.items():
        if field.endswith(ending):
            return word
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    return _WORDS.get(kind, "TEXT")


def _default(info: FieldInfo) -> str | None:
    """Return the default as a user would write it; None if there is none to show."""
    value = info.default
    if value is None or value is PydanticUndefined or isinstance(value, bool) or value == () or value == {}:
        return None
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _joined(options: type[Options], field: str, value: Any) -> Any:
    """Join repeated and comma-separated values: to a tuple, or for a mapping to text that the model parses."""
    if not isinstance(value, list):
        return value
    if field == options.positional:
        return tuple(value)
    if get_origin(_plain(options.model_fields[field].annotation)) is dict:
        return ",".join(value)
    return tuple(word for each in value for word in each.split(",") if word)
