"""Constants of statistics that several parts share."""

Z_95 = 1.959964  # two-sided 95 % point of the normal distribution
