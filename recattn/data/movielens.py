"""MovieLens in the three layouts that it comes in."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from recattn.data.interactions import Interactions

# The flags of u.item, in their order.
# fmt: off
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)
# fmt: on
_FLAGS_BEGIN = 5  # behind movie id, title, release date, video release date and URL

Genres = dict[int, str]


def read_movielens(path: str | Path) -> Interactions:
    """Reads a MovieLens data set; which layout the folder holds is found out from its files.

    - `NAME.inter` and `NAME.item`: RecBole's, tab-separated under headers such as `user_id:token`;
    - `u.data` and `u.item`: the original ones of MovieLens-100K;
    - `ratings.csv` and `movies.csv`: those of newer releases.

    The category of an item is the first genre listed for it. Users and items get dense ids in the order of
    their ids in the files, categories in that of their names; only what is rated counts.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: if the folder does not exist or holds none of these pairs.
        ValueError: for a file that does not have the columns of its layout, or a rated item without a genre.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"path: expected a folder with MovieLens files, got {folder}")
    for layout in _LAYOUTS:
        for ratings in sorted(folder.glob(layout.ratings)):
            items = layout.items(ratings)
            if items.is_file():
                return _interactions(layout.read_ratings(ratings), layout.read_genres(items), items)
    raise FileNotFoundError(
        f"path: expected *.inter and *.item, u.data and u.item, or ratings.csv and movies.csv in {folder},"
        f" got {', '.join(sorted(entry.name for entry in folder.iterdir())) or 'an empty folder'}"
    )


def _interactions(ratings: np.ndarray, genres: Genres, source: Path) -> Interactions:
    """`ratings [N, 4]` float64: user, item, rating, timestamp."""
    if not len(ratings):
        raise ValueError(f"{source.parent}: expected at least one rating, got none")
    _, user = np.unique(ratings[:, 0], return_inverse=True)
    items, item = np.unique(ratings[:, 1].astype(np.int64), return_inverse=True)
    without = [i for i in items.tolist() if not genres.get(i)]
    if without:
        raise ValueError(f"{source}: expected a genre for each rated item, got none for {without[:5]}")
    _, category = np.unique([genres[i] for i in items.tolist()], return_inverse=True)
    return Interactions.from_log(
        user=torch.from_numpy(user),
        item=torch.from_numpy(item),
        rating=torch.from_numpy(ratings[:, 2].astype(np.float32)),
        timestamp=torch.from_numpy(ratings[:, 3].astype(np.int64)),
        item_category=torch.from_numpy(category),
    )


# ---------------------------------------------------------------- files


def _numbers(path: Path, columns: Sequence[int], delimiter: str, skip: int) -> np.ndarray:
    try:
        return np.loadtxt(path, delimiter=delimiter, skiprows=skip, usecols=columns, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _columns(path: Path, delimiter: str, names: Sequence[str]) -> list[int]:
    """Where the columns of these names are, by the header; RecBole's types are not part of a name."""
    with path.open(encoding="utf-8") as file:
        header = [name.partition(":")[0] for name in file.readline().strip().split(delimiter)]
    missing = [name for name in names if name not in header]
    if missing:
        raise ValueError(f"{path}: expected columns {', '.join(names)}, got {', '.join(header)}")
    return [header.index(name) for name in names]


def _rows(path: Path, delimiter: str, encoding: str, *, quoted: bool = False) -> list[list[str]]:
    with path.open(encoding=encoding, newline="") as file:
        reader = csv.reader(
            file, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        )
        return [row for row in reader if row]


def _genres(path: Path, rows: Sequence[Sequence[str]], parse: Callable[[Sequence[str]], str]) -> Genres:
    try:
        return {int(row[0]): parse(row) for row in rows}
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: expected an item id and its genres in each row, {error}") from error


def _recbole_ratings(path: Path) -> np.ndarray:
    return _numbers(path, _columns(path, "\t", ("user_id", "item_id", "rating", "timestamp")), "\t", skip=1)


def _recbole_genres(path: Path) -> Genres:
    item, genres = _columns(path, "\t", ("item_id", "class"))
    rows = [(row[item], row[genres]) for row in _rows(path, "\t", "utf-8")[1:]]
    return _genres(path, rows, lambda row: row[1].partition(" ")[0])


def _original_ratings(path: Path) -> np.ndarray:
    return _numbers(path, range(4), "\t", skip=0)


def _original_genres(path: Path) -> Genres:
    def first(row: Sequence[str]) -> str:
        flags = row[_FLAGS_BEGIN:]
        if len(flags) != len(GENRES):
            raise ValueError(f"got {len(row)} columns instead of {_FLAGS_BEGIN + len(GENRES)}")
        return GENRES[flags.index("1")] if "1" in flags else ""

    return _genres(path, _rows(path, "|", "latin-1"), first)


def _csv_ratings(path: Path) -> np.ndarray:
    return _numbers(path, _columns(path, ",", ("userId", "movieId", "rating", "timestamp")), ",", skip=1)


def _csv_genres(path: Path) -> Genres:
    item, genres = _columns(path, ",", ("movieId", "genres"))
    rows = [(row[item], row[genres]) for row in _rows(path, ",", "utf-8", quoted=True)[1:]]
    return _genres(path, rows, lambda row: row[1].partition("|")[0])


class _Layout(NamedTuple):
    ratings: str  # a pattern
    items: Callable[[Path], Path]  # beside the ratings
    read_ratings: Callable[[Path], np.ndarray]
    read_genres: Callable[[Path], Genres]


_LAYOUTS = (
    _Layout("*.inter", lambda ratings: ratings.with_suffix(".item"), _recbole_ratings, _recbole_genres),
    _Layout("u.data", lambda ratings: ratings.with_name("u.item"), _original_ratings, _original_genres),
    _Layout("ratings.csv", lambda ratings: ratings.with_name("movies.csv"), _csv_ratings, _csv_genres),
)
