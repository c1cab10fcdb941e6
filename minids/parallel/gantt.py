"""Text chart of a simulated pipeline schedule, one line per rank; course/pipeline_chart.py draws a figure."""

import re

from minids.parallel.schedule import Span, Timeline


def gantt(timeline: Timeline, width: int = 160) -> str:
    """Return one line per rank: kind and micro-batch of every action, with a width proportional to its time.

    Dots are idle time; direction 1 is in lower case. Where `width` characters leave no room, the number is omitted.
    """

    def label(span: Span) -> str:
        texts = ((f"{part.kind}{part.micro_batch}", part.direction) for part in span.action.parts)
        return "".join(text.lower() if direction else text for text, direction in texts)

    wanted = max(len(label(s)) / (s.end - s.start) for spans in timeline.spans for s in spans if s.end > s.start)
    scale = min(wanted, width / timeline.makespan)
    lines = []
    for rank, spans in enumerate(timeline.spans):
        line = ""
        for span in spans:
            start, end = round(span.start * scale), round(span.end * scale)
            text = label(span) if len(label(span)) <= end - start else re.sub(r"\d", "", label(span))
            line = line.ljust(start, ".") + text[: end - start].ljust(end - start, "-")
        lines.append(f"rank {rank:<3}" + line.ljust(round(timeline.makespan * scale), "."))
    return "\n".join(lines)
