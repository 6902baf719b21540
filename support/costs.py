"""What computing costs, known beforehand."""

MOST_TOKENS = 8192  # of a row, however cheap


def row_cost(config, device):
    """A function: tokens of a row → what it costs, in tokens that pass through the linear layers.

    A layer takes 2 · (4 · hidden² + 3 · hidden · intermediate) operations a token, and 4 · hidden for each pair of tokens
    of a row, since a dense mask is computed everywhere; element by element, so that such an operation is slower (measured
    on two CPU cores: four times). Every row costs a little by itself.
    """
    slowness = 4.0 if device.type == "cpu" else 2.0
    attention = slowness * 2 / (4 * config.hidden_size + 3 * config.intermediate_size)
    return lambda length: 32 + length + attention * length**2
