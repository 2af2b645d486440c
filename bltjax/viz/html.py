"""Patches of a text as an HTML page."""

import html

from bltjax.viz.cuts import HTML_COLOURS, Cut, patch_strings, spans, summary


def page(text: bytes, cuts: list[Cut], note: str) -> str:
    """A self-contained HTML page: the patches of every scheme, entropies in their tooltips."""
    sections = []
    for cut in cuts:
        marked, strings = [], patch_strings(text, cut.begins)
        for number, (shown, (begin, end)) in enumerate(zip(strings, spans(text, cut), strict=True)):
            hint = f"patch {number + 1}: bytes {begin} to {end - 1}, {end - begin} long"
            if cut.entropies is not None:
                hint += f", entropy {cut.entropies[begin]:.3f} nats"
            colour = HTML_COLOURS[number % len(HTML_COLOURS)]
            body = html.escape(shown).replace("\n", "<br>")
            marked.append(f'<span style="background:{colour}" title="{hint}">{body}</span>')
        sections.append(
            f"<h2>{html.escape(cut.title)}</h2><p>{summary(text, cut)}</p>{curve(text, cut)}"
            f'<div class="text">{"".join(marked)}</div>'
        )
    return (
        '<!doctype html><html><head><meta charset="utf-8"><title>Patches</title><style>'
        "body{font-family:system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;"
        "color:#222;background:#fff}h2{font-size:1.1em;margin:2em 0 0}p{margin:.3em 0;color:#555}"
        '.text{font-family:"DejaVu Sans Mono",Menlo,Consolas,"Noto Sans Mono CJK SC",'
        '"Noto Color Emoji","WenQuanYi Zen Hei",monospace;line-height:1.7;white-space:pre-wrap;'
        "overflow-wrap:anywhere}span{border-radius:.2em;padding:.1em 0}svg{width:100%;height:6em}"
        f"</style></head><body><h1>Patches</h1><p>{html.escape(note)}</p>{''.join(sections)}"
        "</body></html>\n"
    )


def curve(text: bytes, cut: Cut) -> str:
    """The entropies as an SVG line, with the threshold."""
    if cut.entropies is None:
        return ""
    width, top = max(1, len(text) - 1), 5.6  # ln 260 is 5.56
    points = " ".join(f"{i},{top - min(h, top):.3f}" for i, h in enumerate(cut.entropies.tolist()))
    line = ""
    if not cut.patching.monotonic:
        y = top - cut.patching.threshold
        line = f'<line x1="0" x2="{width}" y1="{y}" y2="{y}" stroke="#c33" stroke-dasharray="4"'
        line += ' vector-effect="non-scaling-stroke"/>'
    return (
        f'<svg viewBox="0 0 {width} {top}" preserveAspectRatio="none"><title>entropy of each byte'
        f' given those before it, 0 to {top} nats</title><polyline points="{points}" fill="none"'
        f' stroke="#357" vector-effect="non-scaling-stroke"/>{line}</svg>'
    )
