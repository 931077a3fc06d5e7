"""Station 0: any dataset -> Source."""
