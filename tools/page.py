"""Writes model cards, and self-contained pages with style, scripts and pictures, which make no requests."""

import base64
import io
import re
from pathlib import Path
from typing import Any

from pipeline.files import write_text
from tools import cli


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fills in a template; in HTML, all values are escaped."""
    import jinja2

    places, escaped = jinja2.PackageLoader(__package__), jinja2.select_autoescape()
    env = jinja2.Environment(loader=places, autoescape=escaped, trim_blocks=True, lstrip_blocks=True)
    env.filters["printable"] = cli.printable
    write_text(path, env.get_template(template).render(values, plotly=plotly))


def plotly() -> str:
    """Plotly's JavaScript."""
    from plotly.offline import get_plotlyjs

    # Plotly registers lines, bars and then 45 kinds of plots that no page uses, most of its start-up time.
    return re.sub(r"(register\(\[[\w$]+\(\)),[^]]*", r"\1", get_plotlyjs())


def thumbnail(pixels: Any, side: int) -> str:
    """A JPEG of at most `side` pixels, as a data URL."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
