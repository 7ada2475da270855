"""What summaries are told from: the texts of their assets' other spans, once these are in the ledger.

A summary is a span like any other, planned and counted with the rest, and done when they are.
"""

from __future__ import annotations

import duckdb

from operators.tracks import FRAMES, SUMMARY
from pipeline import ledger

SUMMARIES = "summaries"


def tell(db: duckdb.DuckDBPyConnection) -> None:
    """Make `summaries`: the summaries of `todo`, with what they are about in place of the variables.

    That is a JSON object: captions and transcript, lists of segments or null; failed, the code of a
    span that gave neither, or null.
    """
    db.execute(
        f"""CREATE OR REPLACE TABLE {SUMMARIES} AS
        SELECT asked.* REPLACE (told AS variables)
        FROM (SELECT * FROM todo WHERE track = '{SUMMARY}') AS asked LEFT JOIN (
            SELECT asset_id, to_json({{
                'captions': {ledger.segments_of(f"track = '{FRAMES}'")},
                'transcript': {ledger.segments_of(f"track != '{FRAMES}'")},
                'failed': any_value(error_code)
            }})::VARCHAR AS told
            FROM (
                SELECT * FROM ledger_parts
                SEMI JOIN (SELECT asset_id, division FROM todo WHERE track = '{SUMMARY}')
                USING (asset_id, division) {ledger.ONE_STATE}
            ) WHERE track != '{SUMMARY}' GROUP BY asset_id
        ) USING (asset_id)"""
    )
