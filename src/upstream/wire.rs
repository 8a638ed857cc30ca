//! The vendor's JSON, in the vendor's own spelling.
