"""DINO, iBOT and KoLeo as their papers write them: plain loops over floats, nothing of ours."""

import math

Row = list[float]


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def dot(a: Row, b: Row) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(row: Row) -> Row:
    length = math.sqrt(dot(row, row))
    return [x / length for x in row]


def head(x: Row, layers: list[tuple[list[Row], Row]], prototypes: list[Row]) -> Row:
    """DINO, appendix C: an MLP, an L2-normalised bottleneck, prototypes of length 1."""
    for i, (weight, bias) in enumerate(layers):
        x = [dot(row, x) + b for row, b in zip(weight, bias, strict=True)]
        if i < len(layers) - 1:
            x = [gelu(value) for value in x]
    x = unit(x)
    return [dot(unit(prototype), x) for prototype in prototypes]


def softmax(logits: Row, temperature: float) -> Row:
    powers = [math.exp(x / temperature) for x in logits]
    return [power / sum(powers) for power in powers]


def cross_entropy(target: Row, logits: Row, temperature: float) -> float:
    log_sum = math.log(sum(math.exp(x / temperature) for x in logits))
    return -sum(p * (x / temperature - log_sum) for p, x in zip(target, logits, strict=True))


def centred(rows: list[Row], center: Row, temperature: float) -> list[Row]:
    """DINO, algorithm 1: softmax((t - C) / tpt)."""
    return [softmax([x - c for x, c in zip(row, center, strict=True)], temperature) for row in rows]


def balanced(rows: list[Row], temperature: float) -> list[Row]:
    """Sinkhorn-Knopp as DINOv2 says it: Q [K, B]; three times, rows to 1/K each and columns to 1/B each."""
    n, k = len(rows), len(rows[0])
    q = [[math.exp(rows[j][i] / temperature) for j in range(n)] for i in range(k)]
    whole = sum(sum(row) for row in q)
    q = [[x / whole for x in row] for row in q]
    for _ in range(3):
        q = [[x / sum(row) / k for x in row] for row in q]
        columns = [sum(q[i][j] for i in range(k)) for j in range(n)]
        q = [[q[i][j] / columns[j] / n for j in range(n)] for i in range(k)]
    return [[q[i][j] * n for i in range(k)] for j in range(n)]


def moved_center(center: Row, rows: list[Row], momentum: float) -> Row:
    """DINO, equation 4."""
    return [momentum * c + (1 - momentum) * sum(row[i] for row in rows) / len(rows) for i, c in enumerate(center)]


def dino(
    student: list[list[Row]],
    targets: list[list[Row]],
    student_views: list[int],
    teacher_views: list[int],
    temperature: float,
) -> float:
    """DINO, equation 3: [view][sample] logits and targets; the mean over pairs of different views."""
    total, pairs = 0.0, 0
    for q, target in zip(teacher_views, targets, strict=True):
        for v, logits in zip(student_views, student, strict=True):
            if v == q:
                continue
            each = [cross_entropy(p, x, temperature) for p, x in zip(target, logits, strict=True)]
            total += sum(each) / len(each)
            pairs += 1
    return total / pairs


def ibot(
    student: list[list[list[Row]]],
    targets: list[list[list[Row]]],
    masks: list[list[list[bool]]],
    temperature: float,
) -> float:
    """iBOT, equation 2, as its public code averages: [view][sample][patch]; only hidden patches' targets are read."""
    total = 0.0
    for logits_v, targets_v, masks_v in zip(student, targets, masks, strict=True):
        for logits_b, targets_b, mask in zip(logits_v, targets_v, masks_v, strict=True):
            each = [
                cross_entropy(targets_b[patch], logits_b[patch], temperature)
                for patch in range(len(mask))
                if mask[patch]
            ]
            total += sum(each) / max(len(each), 1) / len(logits_v)
    return total / len(student)


def koleo(views: list[list[Row]]) -> float:
    """-mean ln of the distance to the nearest other of the batch, on the unit sphere, summed over views; 1e-8 and the
    sum as in DINOv2's code."""
    total = 0.0
    for view in views:
        rows = [unit(row) for row in view]
        for i, row in enumerate(rows):
            nearest = min(math.dist(row, other) for j, other in enumerate(rows) if j != i)
            total -= math.log(nearest + 1e-8) / len(rows)
    return total
