"""Pages that work offline: one file each, with the style of all."""

from __future__ import annotations

from typing import Any

from autocompress.report.figures import LIGHT
from autocompress.report.view import format_score
from autocompress.units import format_count, format_duration, format_size


def filled(template: str, **values: Any) -> str:
    """A template of `autocompress/templates` with these values. Everything that they say is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("autocompress"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": format_duration, "size": format_size, "score": format_score, "count": format_count}
    return environment.get_template(template).render(light=LIGHT, **values)
