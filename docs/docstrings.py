"""An extension of griffe: it shows the sections of our docstrings that are not Google's."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """Give `griffe` the names that it knows: it shows "Examples:" as code, and others as boxes or paragraphs."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the sections of one docstring."""
        if obj.docstring is None:
            return
        text = obj.docstring.value
        text = re.sub(
            r"^Example:(?: (.*))?$", lambda found: f"Examples:\n    {found[1] or ''}".rstrip(), text, flags=re.M
        )
        # A sentence behind the colon is a paragraph, no section.
        text = re.sub(r"^(Collectives|Sources?): ", r"**\1.** ", text, flags=re.M)
        obj.docstring.value = text
