"""Whether a network is fit to be used or saved."""

import torch


def first_non_finite(net: torch.nn.Module) -> str | None:
    """The name of a parameter or buffer of `net` that holds NaN or infinity; None if all are finite.

    Infinity is allowed in buffers that aren't saved with the network, such as attention masks.
    """
    saved = net.state_dict().keys()
    tensors = {name: t for name, t in (*net.named_parameters(), *net.named_buffers()) if t.is_floating_point()}
    if not tensors:
        return None
    bad = [t.isfinite().all().logical_not() if name in saved else t.isnan().any() for name, t in tensors.items()]
    bad = (
        torch.stack([flag.cpu() for flag in bad]) if len({t.device for t in tensors.values()}) > 1 else torch.stack(bad)
    )
    return next((name for name, is_bad in zip(tensors, bad.tolist()) if is_bad), None)
