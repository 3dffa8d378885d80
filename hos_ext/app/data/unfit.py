"""The error of a file that is not taken, before it is known who asked for it."""


class Unfit(ValueError):
    """Why a file is not taken: it must `rule`, got `got`."""

    def __init__(self, rule: str, got: str) -> None:
        super().__init__(f"must {rule}, got {got}")
        self.rule, self.got = rule, got
