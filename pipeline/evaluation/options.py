"""The flags of ``jobs/evaluate.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hired.errors import ConfigurationError

SECTIONS = ("table", "ablations", "fastv", "attention")
POLICIES = (
    *("keep-all", "random", "grid", "pool", "thumbnail", "hired", "hired-reference", "prumerge"),
    *("prumerge+", "visionzip", "divprune", "scope", "hired-scope", "hired-spread"),
)
# The test split's seed and the tuning split's are never the same, whatever --seed says.
TUNING = 1_000_000


@dataclass(frozen=True, slots=True)
class Profile:
    """How much is asked."""

    pictures: int
    policies: tuple[str, ...]
    budgets: tuple[float, ...]
    random_seeds: int
    sections: tuple[str, ...]


PROFILES = {
    # At least 1,000 questions of each task: six pictures in seven are scenes, each of which has a caption.
    "full": Profile(1176, POLICIES, (0.4, 0.2, 0.1, 0.05), 3, SECTIONS),
    "small": Profile(7, ("keep-all", "random", "thumbnail", "hired"), (0.2,), 1, ("table",)),
}


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked of whom. Options that are None or empty come from the profile."""

    model: str = "embedded"
    profile: str = "full"
    sections: tuple[str, ...] = ()
    pictures: int | None = None
    questions: int = 2
    seed: int = 1
    tuning: bool = False
    tasks: tuple[str, ...] = ()
    max_new_tokens: int = 32
    policies: tuple[str, ...] = ()
    budgets: tuple[float, ...] = ()
    alpha: float = 0.5
    random_seeds: int | None = None
    ablation_budget: float = 0.1
    ablation_pictures: int | None = None
    fastv_layers: tuple[int, ...] = (1, 2)
    fastv_pictures: int = 42
    attention_pictures: int = 42
    draws: int = 10_000
    speed: Path = Path("docs/results/benchmark-embedded.json")
    beside: tuple[Path, ...] = ()
    device: str | None = None
    dtype: str | None = None
    actors: int | None = None
    threads: int = 1
    chunk: int = 2
    work: Path = Path("build/evaluation")
    output: Path = Path("docs/results/accuracy")
    write_tasks: Path | None = None

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ConfigurationError(f"--profile {self.profile}: use {' or '.join(PROFILES)}")
        if unknown := set(self.sections) - set(SECTIONS):
            raise ConfigurationError(f"--sections {' '.join(sorted(unknown))}: use {', '.join(SECTIONS)}")
        for name in (
            "questions",
            "max_new_tokens",
            "fastv_pictures",
            "attention_pictures",
            "draws",
            "threads",
            "chunk",
        ):
            self._check_positive(name)
        for name in ("pictures", "random_seeds", "ablation_pictures", "actors"):
            if getattr(self, name) is not None:
                self._check_positive(name)
        if not all(0 < budget <= 1 for budget in (*self.budgets, self.ablation_budget)):
            raise ConfigurationError("--budgets and --ablation-budget are rates above 0 and up to 1")
        if any(number < 1 for number in self.fastv_layers):
            raise ConfigurationError("--fastv-layers: at least one layer must see all tokens to rank them by")
        if "fastv" in self.wanted.sections and "table" not in self.wanted.sections:
            raise ConfigurationError("--sections fastv is compared with the table's arms: add table")
        if not 0 <= self.seed < TUNING:
            raise ConfigurationError(f"--seed must be from 0 to {TUNING - 1}")

    def _check_positive(self, name: str) -> None:
        if getattr(self, name) < 1:
            raise ConfigurationError(f"--{name.replace('_', '-')} must be at least 1")

    @property
    def wanted(self) -> Profile:
        """The profile with what the options say otherwise."""
        profile = PROFILES[self.profile]
        return Profile(
            pictures=self.pictures or profile.pictures,
            policies=self.policies or profile.policies,
            budgets=self.budgets or profile.budgets,
            random_seeds=self.random_seeds or profile.random_seeds,
            sections=self.sections or profile.sections,
        )

    @property
    def drawing_seed(self) -> int:
        """What decides the drawn pictures."""
        return self.seed + TUNING * self.tuning

    @property
    def split(self) -> str:
        """Which of the two sets is asked."""
        return "tuning" if self.tuning else "test"
