"""The papers that a distillation builds on, by its options."""

from .config import DistillationConfig

SID = "2404.04057"
BY_OBJECTIVE = {"diff-instruct": "2305.18455", "dmd": "2311.18828"}
SCORE_IMPLICIT_MATCHING, SIDA, LONG_SHORT_GUIDANCE = "2410.16794", "2410.14919", "2406.01561"
FEW_STEP, AUTOGUIDANCE, LORA = "2505.12674", "2406.02507", "2106.09685"


def papers(config: DistillationConfig) -> list[str]:
    """arXiv numbers of the papers whose methods the options ask for, SiD's first."""
    guidance = config.guidance
    used = {
        BY_OBJECTIVE.get(config.objective): config.objective in BY_OBJECTIVE,
        SCORE_IMPLICIT_MATCHING: config.huber is not None,
        SIDA: config.gan,
        LONG_SHORT_GUIDANCE: guidance is not None and guidance.by_class,
        FEW_STEP: config.steps > 1 or str(guidance).rpartition(",")[2].startswith(("zero", "anti")),
        AUTOGUIDANCE: guidance is not None and guidance.over_guide is not None,
        LORA: config.lora_rank is not None,
    }
    return [SID, *(paper for paper, is_used in used.items() if paper and is_used)]
