"""Money and time: prices, the meter, traffic, the forecast. Pure functions over records."""
