"""Measuring layer contribution: the metric, one run, the sweep of many, and the engines that spread it out."""
