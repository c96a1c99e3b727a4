"""Commands that leave what they stand in: exit, return, break and continue."""


class Leave(Exception):
    """exit, return, break or continue."""

    def __init__(self, how: str, count: int = 1) -> None:
        super().__init__(how)
        self.how, self.count = how, count
