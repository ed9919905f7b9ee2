"""HTML and SVG elements as strings; everything that is not markup already is escaped."""

import html
import re
from collections.abc import Iterable

# Control characters, and those that turn the direction of the text around them.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
VOID = frozenset({"meta", "img", "br"})
NAME = re.compile("[a-zA-Z][a-zA-Z0-9-]*")


class Markup(str):
    """Text that is HTML already; only `tag` and `join` make it."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Any text as HTML: quotes and brackets escaped, unseen characters and surrogates spelt out."""
    if isinstance(text, Markup):
        return text
    plain = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    plain = UNSEEN.sub(lambda found: f"\\u{ord(found.group()):04x}", plain)
    return Markup(html.escape(plain, quote=True))


def join(children: Iterable[object], between: str = "") -> Markup:
    """Children one after the other; None is left out, lists are opened."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, list | tuple):
            parts.append(join(child))
        else:
            parts.append(escape(child))
    return Markup(str(escape(between)).join(parts))


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: text, which is escaped, Markup, or lists of these; None is left out.
        attributes: values are escaped, None and False are left out, True gives the bare name; `_`
            stands for `-`, and one at the end is dropped (`class_`).

    Raises:
        ValueError: a name that is none, or an attribute that would run a script.
    """
    shown = []
    for key, value in attributes.items():
        key = key.removesuffix("_").replace("_", "-")
        if not NAME.fullmatch(key) or key.lower().startswith("on"):
            raise ValueError(f"attribute {key!r}")
        if value is None or value is False:
            continue
        if isinstance(value, float):
            value = f"{value:.2f}".rstrip("0").rstrip(".")
        shown.append(f" {key}" if value is True else f' {key}="{escape(value)}"')
    if not NAME.fullmatch(name) or name.lower() == "script":
        raise ValueError(f"element {name!r}")
    opening = f"<{name}{''.join(shown)}>"
    return Markup(opening if name in VOID else f"{opening}{join(children)}</{name}>")


def page(title: str, style: str, body: Markup) -> str:
    """A whole document that may load nothing from anywhere (Content-Security-Policy)."""
    policy = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', body), lang='en')}\n"
