"""Pages that hold all they need: style, scripts and pictures, so that no request leaves them."""

import base64
import io
from pathlib import Path
from typing import Any

from pipeline.files import write_text
from tools import cli

TEMPLATES = Path(__file__).with_name("templates")


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fills in a template; all values are escaped."""
    import jinja2
    from plotly.offline import get_plotlyjs

    places = jinja2.FileSystemLoader(TEMPLATES)
    env = jinja2.Environment(loader=places, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters["printable"] = cli.printable
    write_text(path, env.get_template(template).render(values, plotly=get_plotlyjs))


def thumbnail(pixels: Any, side: int) -> str:
    """A JPEG of at most `side` pixels, as a data URL."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
