"""Exact greedy graph cut: the picks of a float64 greedy over a full similarity matrix, in one of three regimes.

The gain of a row x is its inner product with one vector, `w = lam * sum(left) - 2 * sum(picked)` (`pool.Pool`), because
the similarity is linear in the inner product. A pick therefore changes all gains by twice the inner products with the
picked row. Every regime keeps approximate gains with a proved bound on their error. Where the bound does not decide, the
few rows in question are computed in float64, and where that does not decide either, by exact arithmetic with one
rounding (`group.Group`); gains that are then equal are ties, which go to the lowest position. So the picks are the
same in every regime, for any number of threads, and on every device.

Equal rows are one row of the pool, which stands for the lowest of their samples that is left. Rows that differ may have
equal gains at every pick, as one-hot rows do. If all entries are whole multiples of one number (`prepare.Prepared.step`,
such as 1, or 0.7071... for the cosine of rows of two ones), the rows are divided by it, and float64 adds whole numbers
without any error: gains are then compared as they are, ties need no exact arithmetic, and the matrix is exact.

`"dense"` and `"stream"` keep scores of all rows (`scores.Scores`), which are gains in whole numbers of some unit. A pick
    subtracts from them the inner products of its row with all rows, rounded to whole numbers. Additions of whole
    numbers make no error, so after t picks a gain is off by t times the error of an inner product: its rounding to whole
    units and that of the product itself, which is made in float32. A unit is twice the greatest inner product divided
    by 2**19, or by 32,700. Up to hundreds of picks are proposed. Then float64 decides (`pool.Pool.confirm`), all at
    once, where another row was within the bound. A wrong pick and those after it are undone. Scores start again from
    float64 gains once that costs less than the decisions, which the growing bound multiplies.

    `"dense"` computes all inner products once, for all bins that follow, and a pick costs about n additions. They have 4
    bytes, or 2 with more than 8,192 rows, and are made in float64 where float32 errs by more than 20 units.
    `"stream"` computes those of a pick when it is made, by a product of the float32 rows, which are stored by columns,
    with the picked row. Memory is 4 n W bytes.

`"candidates"` (`candidates.Candidates`, `proof.Proof`): a small matrix of the rows of greatest gain, from which hundreds
    of picks are made, and one float64 pass over all rows that proves them. If few are proved, an eighth of the rows
    becomes candidates that have such rounds among themselves, so that passes over all rows are seldom. Between the
    ends of a chunk of picks a gain stays near a straight line, to within twice the distance of the sum of the picks
    from its own line. Memory is of the order of the features. It is the fastest way where one pick hardly changes the
    order of the gains.

On a GPU (`device.DevicePicks`) "dense" from 4,096 rows on, with a float32 matrix of 4 n^2 bytes, and "stream" need no
bound on the scores: 64 picks are made on the device as one CUDA graph, and then the float64 gains of all rows before each
of them are computed by one product of matrices, which confirms them.

`"auto"` (`engine`) compares what the regimes cost (`costs.Costs`). On a GPU it makes the matrix if that saves a tenth of the
cost of passes, and else passes. On the CPU, and for rows that do not fit the GPU in float64, the matrix (if it fits the
memory allowed, `BinConfig.matrix_memory`) or passes, whichever cost less, are used at once if they cost less than twice
what candidates would at best. Otherwise it begins with candidates, and counts what its rounds cost above their steady
cost. Once that, and what all picks that are left would add if rounds went on as lately, exceeds the cost of the
matrix and of those picks, the matrix is made and kept for all bins that follow, so what was learned is paid at most once
over. If the matrix does not fit, or passes cost less, passes are made for the rest of a bin in which a pass for each pick
costs less than such rounds.
"""
