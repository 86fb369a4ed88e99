"""Numbers, times and counts as text."""


def kimg_name(nimg: int, batch: int = 1) -> str:
    """Whole kimg in six digits, with the images beyond them unless this is the first iteration of that kimg.

    So no two iterations of a run share a name, names sort by images, and ticks of whole kimg have EDM's names:
    10 240 images in batches of 256 are '000010', the 10 496 after them '000010.496'.
    """
    kimg, beyond = divmod(nimg, 1000)
    return f"{kimg:06d}" if beyond < batch else f"{kimg:06d}.{beyond:03d}"


def format_number(value: float) -> str:
    """The shortest usual text of exactly this number: 2 for 2.0, 1e-05 for 0.00001."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def format_figure(value: float) -> str:
    """A measured number with three digits, as a reader writes it: 0.0123, 4.3, 4300."""
    return format_number(float(f"{value:.3g}"))


def format_count(count: float) -> str:
    """A large count in thousands or millions, with three digits: 189k, 1.2M."""
    return f"{count / 1e6:.3g}M" if count >= 1e6 else f"{count / 1e3:.3g}k"


def format_time(seconds: float) -> str:
    """Seconds as the shortest of `45s`, `12m 03s`, `5h 09m 00s`, `2d 07h 15m`."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 60 * 60:
        return f"{s // 60}m {s % 60:02}s"
    if s < 24 * 60 * 60:
        return f"{s // 3600}h {s // 60 % 60:02}m {s % 60:02}s"
    return f"{s // 86400}d {s // 3600 % 24:02}h {s // 60 % 60:02}m"
