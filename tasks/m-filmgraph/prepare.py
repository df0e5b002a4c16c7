"""Films joined by the people who rated both; half of the films show their genre.

Nodes: films with exactly one of the five genres and at least eight ratings. Edges: from each film
to the ten films whose raters are most similar (cosine of the 0/1 vectors of raters).
"""

import numpy as np
import pandas as pd

from tasks import build

GENRES = ("Action", "Comedy", "Drama", "Horror", "Children")  # the labels 0 to 4
MIN_RATINGS = 8
NEIGHBOURS = 10


def prepare(raw, public, private):
    ratings = build.read_table(raw, "dslabs/movielens").dropna(subset=["title", "year"])
    films = ratings.groupby("movieId").agg(
        genres=("genres", "first"),
        year=("year", "first"),
        ratings=("rating", "size"),
        mean_rating=("rating", "mean"),
    )
    flags = np.array([[g in text.split("|") for g in GENRES] for text in films["genres"]])
    films = films[(flags.sum(axis=1) == 1) & (films["ratings"] >= MIN_RATINGS).to_numpy()]
    rng = np.random.default_rng(0)
    films = films.iloc[rng.permutation(len(films))]  # node numbers must not follow film ids
    genre = np.array([[g in text.split("|") for g in GENRES] for text in films["genres"]])

    ratings = ratings[ratings["movieId"].isin(films.index)]
    node = pd.Series(range(len(films)), index=films.index)
    seen = np.zeros((len(films), ratings["userId"].max() + 1))
    seen[node[ratings["movieId"]], ratings["userId"]] = 1
    similarity = seen @ seen.T / np.sqrt(np.outer(seen.sum(1), seen.sum(1)))
    np.fill_diagonal(similarity, 0)
    similarity = similarity.round(6)  # ties must not hang on the last bit
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :NEIGHBOURS]
    source = np.repeat(np.arange(len(films)), NEIGHBOURS)
    edges = pd.DataFrame(
        {
            "source": source,
            "target": nearest.ravel(),
            "weight": similarity[source, nearest.ravel()].round(4),
        }
    )
    nodes = pd.DataFrame(
        {
            "node": np.arange(len(films)),
            "year": films["year"].astype(int).to_numpy(),
            "ratings": films["ratings"].to_numpy(),
            "mean_rating": films["mean_rating"].round(3).to_numpy(),
            "genre": genre.argmax(axis=1),
        }
    )
    train, test = build.split_rows(len(nodes), len(nodes) // 2, seed=1, strata=nodes["genre"])
    build.write(
        public,
        private,
        train=nodes.iloc[train],
        test=nodes.iloc[test],
        target="genre",
        metric="accuracy",
        edges=edges,
    )
