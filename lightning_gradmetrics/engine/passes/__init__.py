"""Forward and backward passes of a batch that follow a plan, and the tables that collect their moments."""
