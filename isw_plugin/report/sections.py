"""The sections of the page: each draws its figure and sets its numbers beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import isw_plugin.report.tables as tables
from isw_plugin.calibrate import Calibration
from isw_plugin.measure import GateReport, LatencyPoint, Records
from isw_plugin.report.difficulty import EasyToHard, easy_to_hard
from isw_plugin.report.figures import frontier, latency_curve
from isw_plugin.report.image_figures import accuracy_curve, class_ratios, extreme_images
from isw_plugin.report.page import Picture, Section
from isw_plugin.report.site_figures import channel_heatmap, cv_per_site, keep_per_site

__all__ = ["Material", "sections"]

_SPREAD = "Bar: mean; thick line: half of the images; thin line: 90 % of them; tick: median."


@dataclass(frozen=True)
class Material:
    """What a page is made of; figures go into ``folder``, with ``caption`` on each.

    ``caption`` is what the user said, ``about``, with how many images and which machine; calibration saw other images.
    """

    report: GateReport
    records: Records
    classes: Sequence[str]
    calibration: Calibration | None
    images: Sequence[Any] | None
    latencies: Sequence[LatencyPoint]
    folder: Path
    about: str
    caption: str

    def picture(self, name: str, alt: str, note: str, *, colors: bool = False) -> Picture:
        """A figure that has just been drawn; ``colors`` that mean something stay in the dark, too."""
        return Picture(self.folder / name, alt, note, colors)


def sections(material: Material) -> dict[str, Section]:
    """All sections in order, by id; the figures are written."""
    return {
        "frontier": _frontier(material),
        "keep-ratio": _keep(material),
        "cv": _cv(material),
        "channels": _channels(material),
        "easy-to-hard": _curve(material),
        "images": _images(material),
        "classes": _classes(material),
        "latency": _latency(material),
    }


def _frontier(m: Material) -> Section:
    title = "Accuracy against MACs saved"
    if m.calibration is None:
        return Section(title, "No calibration was given: pass what calibrate returned as calibration= to see it here.")
    frontier({"frontier": m.calibration}, m.folder / "frontier.png", _held_out(m.calibration, m.about))
    best = m.calibration.best
    return Section(
        title,
        f"Every gate setting that calibrate tried on its {m.calibration.instances:,} held-out images. The chosen one: "
        f"{best}, against {m.calibration.accuracy:.4f} with gates off.",
        m.picture(
            "frontier.png",
            f"Accuracy against MACs saved, {len(m.calibration.candidates)} candidates; chosen: {best}",
            "Dots: candidates; line: those that no other beats in both; star: chosen; dotted: gates off. "
            "What lies below is in the table.",
        ),
        tables.calibration_table(m.calibration),
    )


def _held_out(calibration: Calibration, about: str) -> str:
    counts = f"{calibration.instances:,} held-out images, {len(calibration.candidates)} candidates"
    return f"{about} · {counts}" if about else counts


def _keep(m: Material) -> Section:
    keep_per_site(m.records, m.folder / "keep_per_site.png", m.caption)
    least = min(m.report.per_site, key=lambda name: m.report.per_site[name].keep_ratio)
    share = m.report.per_site[least].keep_ratio
    return Section(
        "Channels kept, site by site",
        "Share of channels that an image computes. Where images differ, the thin line is long: that is what a static "
        "pruner cannot use.",
        m.picture("keep_per_site.png", f"Channels kept by site; least at {least}, {share:.1%} on average", _SPREAD),
        tables.keep_table(m.report, m.records),
    )


def _cv(m: Material) -> Section:
    cv_per_site(m.records, m.folder / "cv_per_site.png", m.caption)
    most = max(m.report.per_site, key=lambda name: m.report.per_site[name].cv)
    return Section(
        "CV of channel norms, site by site",
        "Standard deviation over mean of an image's channel norms (Eq. 6; the paper's Table 2 has the means). A site "
        "is prunable for an image where it exceeds alpha.",
        m.picture("cv_per_site.png", f"CV by site; highest at {most}, {m.report.per_site[most].cv:.2f}", _SPREAD),
        tables.cv_table(m.records),
    )


def _channels(m: Material) -> Section:
    channel_heatmap(m.records, m.classes, m.folder / "heatmap.png", m.caption)
    return Section(
        "Which channels each class drops",
        "The paper's Figure 3. Channels that every image drops can go for good: see pruner.to_static.",
        m.picture(
            "heatmap.png",
            f"Heat-map of channels dropped: {len(m.records.keep)} sites by {len(m.classes)} classes by channel; the "
            "table sums it up",
            "A band a site, a row a class, a column a channel; yellow: every image of the class drops it, dark: none.",
            colors=True,
        ),
        tables.channel_table(m.records),
    )


def _curve(m: Material) -> Section:
    accuracy_curve(m.records, m.folder / "easy_to_hard.png", m.caption)
    curve = easy_to_hard(m.records)
    return Section(
        "Accuracy by share of channels dropped",
        f"The paper's Figure 4: images in order of the share of channels that they drop. In the paper those that drop "
        f"most are the easier ones. {_found(curve)}",
        m.picture(
            "easy_to_hard.png",
            f"Accuracy: {curve.easier:.1%} in the half that drops most, {curve.harder:.1%} in the other half",
            f"Blue: every {curve.window} neighbours; green: all up to here; red: all images; black: the halves. "
            "Images that drop equally many count with their mean.",
        ),
        tables.halves_table(m.records, curve),
    )


def _found(curve: EasyToHard) -> str:
    """What the halves say, in words that follow the figures."""
    gap, error = 100 * (curve.easier - curve.harder), 100 * curve.error
    figures = (
        f"Here the half that drops most is {abs(gap):.2f} points {'more' if gap >= 0 else 'less'} accurate than the "
        f"half that drops least (standard error {error:.2f})"
    )
    if abs(gap) < 2 * error or not gap:
        return f"{figures}: no difference that chance would not make."
    return f"{figures}: {'easier, as in the paper' if gap > 0 else 'harder, unlike in the paper'}."


def _images(m: Material) -> Section:
    title, table = "The images that drop most and least", tables.extremes_table(m.records, m.classes)
    if m.images is None:
        text = "No images were given: pass them, in the loader's order, as images= to see them."
        return Section(title, text, table=table)
    extreme_images(m.records, m.images, m.folder / "easiest_hardest.png", m.caption, classes=m.classes)
    first = table.rows[0]
    return Section(
        title,
        "As in the paper's Figures 1 and 5, which call them easy and hard.",
        m.picture(
            "easiest_hardest.png",
            f"The {len(table.rows)} images that drop most and least; most: {first[2]}, {first[3]} dropped; least: "
            f"{first[6]}, {first[7]} dropped; the table has them all",
            "Above an image: class, share of channels dropped. Red frame: the model is wrong.",
            colors=True,
        ),
        table,
        wide=True,
    )


def _classes(m: Material) -> Section:
    class_ratios(m.records, m.classes, m.folder / "classes.png", m.caption)
    table = tables.class_table(m.report, m.records, m.classes)
    first, last = table.rows[0], table.rows[-1]
    return Section(
        "Channels dropped, class by class",
        f"Most for {first[0]} ({first[2]}), least for {last[0]} ({last[2]}).",
        m.picture(
            "classes.png", f"Channels dropped by class: from {first[0]}, {first[2]}, to {last[0]}, {last[2]}", _SPREAD
        ),
        table,
    )


def _latency(m: Material) -> Section:
    title = "Measured time against channels kept"
    if not m.latencies:
        return Section(
            title,
            f"No times at several keep ratios were given: pass those of latency_by_keep as latencies=. The pass itself "
            f"({m.report.execution}) took {m.report.latency}.",
        )
    latency_curve(m.latencies, m.folder / "latency.png", m.caption)
    ends = [f"{p.latency.ms_per_image:.3f} ms at {p.keep_ratio:.0%}" for p in (m.latencies[0], m.latencies[-1])]
    return Section(
        title,
        "Wall-clock time of an image. Where fewer channels do not take less time, the dense form is the one to use.",
        m.picture(
            "latency.png",
            f"Time against channels kept: {' and '.join(ends)}",
            "Medians and quartiles; dotted: the best dense form.",
        ),
        tables.latency_table(m.latencies),
    )
