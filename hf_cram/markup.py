"""Names of any kind where marks have a meaning: in tables of markdown, in charts of matplotlib."""


def table_cell(text: object) -> str:
    """Text that stays in one cell of a markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def chart_label(name: str) -> str:
    """A name as matplotlib shows it: dollars begin no formula, and an underscore in front hides no entry of a legend."""
    shown = name.replace("$", "\\$")
    return f" {shown}" if shown.startswith("_") else shown
