"""read_movielens, over tiny folders in each of the three layouts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recattn.data import Interactions, read_movielens
from recattn.data.movielens import GENRES

# user, item, rating, timestamp; not in order, with ids that are neither dense nor sorted as strings are.
RATINGS = [
    (10, 7, 4, 300),
    (2, 30, 5, 100),
    (10, 30, 2, 100),
    (2, 7, 3, 100),
    (2, 101, 1, 50),
    (10, 101, 5, 300),
]
# 8 is never rated.
ITEMS = {
    7: ("Café, or Not", ["Comedy", "Drama"]),
    8: ("Unseen", ["Action"]),
    30: ('The "Quoted" One', ["Drama"]),
    101: ("Third", ["Animation", "Children's", "Comedy"]),
}


def write_recbole(folder: Path) -> None:
    rows = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    rows += ["\t".join(map(str, row)) for row in RATINGS]
    (folder / "ml-100k.inter").write_text("\n".join(rows) + "\n")
    rows = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    rows += [f"{i}\t{title}\t1995\t{' '.join(genres)}" for i, (title, genres) in ITEMS.items()]
    (folder / "ml-100k.item").write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_original(folder: Path) -> None:
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in RATINGS))
    rows = []
    for i, (title, genres) in ITEMS.items():
        flags = "|".join(str(int(genre in genres)) for genre in GENRES)
        rows.append(f"{i}|{title}|01-Jan-1995||http://example.org/{i}|{flags}\n")
    (folder / "u.item").write_text("".join(rows), encoding="latin-1")


def write_csv(folder: Path) -> None:
    rows = ["userId,movieId,rating,timestamp", *(",".join(map(str, row)) for row in RATINGS)]
    (folder / "ratings.csv").write_text("\n".join(rows) + "\n")
    rows = ["movieId,title,genres"]
    for i, (title, genres) in ITEMS.items():
        quoted = title.replace('"', '""')
        rows.append(f'{i},"{quoted}",{"|".join(genres)}')
    (folder / "movies.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


WRITERS = [write_recbole, write_original, write_csv]


@pytest.mark.parametrize("write", WRITERS)
def test_every_layout_reads_to_the_same_interactions(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    log = read_movielens(tmp_path)
    # users 2, 10; items 7, 30, 101; categories Animation, Comedy, Drama
    assert log.user.tolist() == [0, 0, 0, 1, 1, 1]
    assert log.item.tolist() == [2, 1, 0, 1, 0, 2]
    assert log.rating.tolist() == [1, 5, 3, 2, 4, 5]
    assert log.timestamp.tolist() == [50, 100, 100, 100, 300, 300]
    assert log.item_category.tolist() == [1, 2, 0]
    assert (log.num_users, log.num_items, log.num_categories) == (2, 3, 3)
    assert log.user.dtype == log.item.dtype == log.timestamp.dtype == log.item_category.dtype == torch.int64


def test_half_stars_and_a_header_in_another_order_are_read(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("timestamp,rating,movieId,userId\n9,3.5,1,4\n")
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n1,One,(no genres listed)\n")
    log = read_movielens(str(tmp_path))
    assert log.rating.tolist() == [3.5]
    assert log.timestamp.tolist() == [9]


def test_a_folder_without_movielens_names_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("")
    (tmp_path / "u.data").write_text("1\t1\t1\t1\n")  # without its u.item
    with pytest.raises(FileNotFoundError, match=r"\*\.inter.*u\.item.*movies\.csv.*got other\.txt, u\.data"):
        read_movielens(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_movielens(tmp_path / "nowhere")


def break_header(folder: Path) -> None:
    write_recbole(folder)
    (folder / "ml-100k.inter").write_text("user_id:token\titem_id:token\n1\t2\n")


def break_number(folder: Path) -> None:
    write_original(folder)
    (folder / "u.data").write_text("1\t7\tfive\t100\n")


def break_item(folder: Path) -> None:
    write_csv(folder)
    (folder / "movies.csv").write_text("movieId,title,genres\n7,Only,Comedy\n")


def break_flags(folder: Path) -> None:
    write_original(folder)
    (folder / "u.item").write_text("7|Title|01-Jan-1995||http://example.org|0|1\n")


def drop_ratings(folder: Path) -> None:
    write_csv(folder)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n")


@pytest.mark.filterwarnings("ignore:loadtxt. input contained no data")
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (break_header, r"ml-100k\.inter: expected columns .*rating, timestamp, got user_id, item_id"),
        (break_number, r"u\.data: .*five"),
        (break_item, r"movies\.csv: expected a genre for each rated item, got none for \[30, 101\]"),
        (break_flags, r"u\.item: .*7 columns instead of 24"),
        (drop_ratings, "expected at least one rating"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_movielens(tmp_path)


def test_interactions_reject_rows_out_of_order() -> None:
    zero, two = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    for user, timestamp in ([1, 0], [0, 0]), ([0, 0], [1, 0]):
        with pytest.raises(ValueError, match="sorted by user and then time"):
            Interactions(torch.tensor(user), two, two.float(), torch.tensor(timestamp), zero)
    with pytest.raises(ValueError, match="item: expected"):
        Interactions(two, zero, two.float(), two, zero)
    with pytest.raises(ValueError, match="user: expected"):
        Interactions(zero[:0], zero[:0], zero[:0].float(), zero[:0], zero)
