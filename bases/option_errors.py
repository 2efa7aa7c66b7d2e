"""What is wrong with an option, in one line, for whatever reads options with pydantic."""

from pydantic_core import ErrorDetails


def describe(detail: ErrorDetails, where: str) -> str:
    """One error of pydantic about the option ``where``, as ``--max-rank: must be at least 1 (got 0)``."""
    context = detail.get("ctx", {})
    got = f"(got {detail['input']!r})"
    match detail["type"]:
        case "missing":
            return f"{where}: is needed"
        case "value_error":
            return f"{where}: {context['error']}"
        case "greater_than_equal":
            return f"{where}: must be at least {context['ge']:g} {got}"
        case "greater_than":
            return f"{where}: must be more than {context['gt']:g} {got}"
        case "less_than_equal":
            return f"{where}: must be at most {context['le']:g} {got}"
        case "less_than":
            return f"{where}: must be less than {context['lt']:g} {got}"
        case "literal_error":
            return f"{where}: must be {context['expected']} {got}"
        case "int_parsing" | "int_type" | "int_from_float":
            return f"{where}: must be a whole number {got}"
        case "float_parsing" | "float_type" | "finite_number":
            return f"{where}: must be a finite number {got}"
        case "extra_forbidden":
            return f"{where}: there is no such option"
        case _:
            return f"{where}: {detail['msg']} {got}"
