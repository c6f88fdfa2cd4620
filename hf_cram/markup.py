"""Names and counts as tables and charts show them: a name may hold what is a mark in markdown or to matplotlib."""


def table_cell(text: object) -> str:
    """Text that stays in one cell of a markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def chart_label(name: str) -> str:
    """A name as matplotlib shows it: dollars begin no formula, and an underscore in front hides no entry of a legend."""
    shown = name.replace("$", "\\$")
    return f" {shown}" if shown.startswith("_") else shown


def describe_count(count: float) -> str:
    """A count of parameters or tokens in three to five digits: `119.5M`."""
    for suffix, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{suffix}"
    return f"{count:g}"
