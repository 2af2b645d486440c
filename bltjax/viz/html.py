"""The room's HTML: its templates, filled in, and the patches of a text as a page."""

from jinja2 import Environment, PackageLoader, StrictUndefined

from bltjax.viz.cuts import COLOURS, Cut, cut_summary, patch_strings, spans

TEMPLATES = Environment(
    loader=PackageLoader("bltjax.viz"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
)
TEMPLATES.globals["COLOURS"] = COLOURS
TOP = 5.6  # nats, of the curve; ln 260 is 5.56


def render(template: str, **values) -> str:
    """A file of templates/ with its values, which are escaped."""
    return TEMPLATES.get_template(template).render(values)


def page(text: bytes, cuts: list[Cut], note: str) -> str:
    """A self-contained HTML page: the patches of every scheme, entropies in their tooltips."""
    sections = [(cut, cut_summary(text, cut), curve(cut), hinted(text, cut)) for cut in cuts]
    width = max(1, len(text) - 1)
    return render("patches.html", note=note, sections=sections, width=width, top=TOP)


def curve(cut: Cut) -> str:
    """The entropies as points of an SVG line; empty if there are none."""
    entropies = [] if cut.entropies is None else cut.entropies.tolist()
    return " ".join(f"{i},{TOP - min(h, TOP):.3f}" for i, h in enumerate(entropies))


def hinted(text: bytes, cut: Cut) -> list[tuple[str, str]]:
    """The patches as strings, each with its tooltip."""
    found = []
    for shown, (begin, end) in zip(patch_strings(text, cut.begins), spans(text, cut), strict=True):
        hint = f"patch {len(found) + 1}: bytes {begin} to {end - 1}, {end - begin} long"
        if cut.entropies is not None:
            hint += f", entropy {cut.entropies[begin]:.3f} nats"
        found.append((shown, hint))
    return found
