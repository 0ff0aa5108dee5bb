"""Which image sizes a backbone takes. Each class declares one; tests, exporters and error messages read it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AnySize:
    """Every height and width from `minimum` pixels on."""

    minimum: int = 32
    dynamic = True

    def check(self, height: int, width: int) -> None:
        """Raises ValueError for an image this backbone cannot take."""
        if height < self.minimum or width < self.minimum:
            raise ValueError(
                f'images must be at least {self.minimum} pixels high and wide, got size=({height}, {width})'
            )


@dataclass(frozen=True)
class Resampled(AnySize):
    """Every size, after tables or filters made for one size are resampled: an extension of the published system."""

    how: str = ''


@dataclass(frozen=True)
class FixedSize:
    """One size alone."""

    size: int | tuple[int, int]
    why: str
    dynamic = False

    @property
    def height_width(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def check(self, height: int, width: int) -> None:
        """Raises ValueError for an image of any other size."""
        if (height, width) != self.height_width:
            raise ValueError(f'images must be of size={self.height_width}, got size=({height}, {width}): {self.why}')
