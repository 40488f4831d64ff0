"""Money and time: prices, the meter, the forecast. Pure functions over records."""
