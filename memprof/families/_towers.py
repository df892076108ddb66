"""Vision towers: those whose tokens an image's are known to be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memprof.families import Family

#: Tokens that a tower puts before those of the patches; ``vision_feature_select_strategy`` ``default`` drops one.
_BEFORE = {"clip_vision_model": 1, "siglip_vision_model": 0}


def check_tower(family: Family, config: Any) -> None:
    """Raise ValueError where a configuration has a vision tower that ``family`` does not count the tokens of.

    A family counts those of the tower that transformers has for it where none is named, and of its own
    :attr:`~memprof.families.Family.towers`. Where a configuration says which of the tower's tokens the language model
    is given, any tower of square images whose patches are all of them will do.
    """
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return
    kind, choice = vision.model_type, getattr(config, "vision_feature_select_strategy", None)
    known = {type(config)().vision_config.model_type, *family.towers, *(_BEFORE if choice is not None else ())}
    if kind not in known:
        raise ValueError(
            f"its vision tower is of type {kind!r}, and memprof counts an image's tokens in {family.title} for "
            f"{', '.join(sorted(known))}: {_INSTEAD}"
        )
    if choice is not None and kind in _BEFORE and _BEFORE[kind] != (choice == "default"):
        raise ValueError(
            f"vision_feature_select_strategy is {choice!r} over a {kind}, so that an image has a token "
            f"{'more' if _BEFORE[kind] else 'fewer'} than patches, which memprof does not count in {family.title}: "
            f"{_INSTEAD}"
        )


_INSTEAD = "give memprof.predict the configuration object and your processor's inputs"
