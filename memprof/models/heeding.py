"""What a model can heed of what is asked: an option that would change nothing is refused, and never passed over."""

from __future__ import annotations

from memprof.errors import UsageError
from memprof.families import Model

#: Pictures that are cut into several tiles by every family that cuts by a number.
_LARGE = ((4096, 1024), (2048, 2048))


def check_heeded(
    model: Model, *, images: int | None = None, tiles: int | None = None, max_tiles: int | None = None
) -> None:
    """Raise UsageError where ``model`` is shown no ``images``, or cuts none into at most ``max_tiles`` tiles."""
    if not model.family.sees:
        for name, given in (("images", images), ("tiles", tiles), ("max_tiles", max_tiles)):
            if given is not None:
                said = f"{model.title} is a language model and takes no images"
                raise UsageError(f"{said}: leave out {_words(name, given)}")
    elif max_tiles is not None and not cuts(model):
        raise UsageError(
            f"{model.title} does not cut an image into a chosen number of tiles: leave out "
            f"{_words('max_tiles', max_tiles)}"
        )


def cuts(model: Model) -> bool:
    """Whether the most tiles that are asked for decide how the model is shown a picture."""
    image = model.family.image
    return any(image(model, *size, 1) != image(model, *size, 16) for size in _LARGE)


def _words(name: str, value: int) -> str:
    return f"{name}={value} (--{name.replace('_', '-')})"
