"""Tables and spans by column, thousands of records at once: numpy and pyarrow are imported with these modules."""
