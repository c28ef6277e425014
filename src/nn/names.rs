//! Names of parameters.

use std::ops::Range;

use crate::tensor::Shape;

/// The name of the part that starts at row `first`: the table's own name if it has only one part.
pub(crate) fn part_name(table: &str, first: usize, parts: usize) -> String {
    if parts == 1 { table.to_string() } else { format!("{table}@{first}") }
}

/// The table that a parameter of this name belongs to, and its first row.
pub(crate) fn table_of_part(name: &str) -> (&str, usize) {
    let part = name.rsplit_once('@').and_then(|(table, first)| Some((table, first.parse().ok()?)));
    part.unwrap_or((name, 0))
}

/// Whether a parameter is the weight of a linear layer inside a block. Those are the parameters that Muon updates, if
/// it is used.
///
/// They are the matrices of a [layer](super::Block) whose name ends with `.weight`: `h.0.attn.q.weight`, and in a stack that
/// is in a scope of its own, `encoder.h.0.attn.q.weight`. Tables (`embed.weight`, `token_type.weight`,
/// `position.weight`, `head.weight`, and their parts such as `embed.weight@64`) are outside of blocks; norms, biases
/// and gates have only one dimension. A block that contains a matrix of another kind, such as a table, keeps it from
/// Muon by another last name: `h.0.values.table`.
///
/// The layers of a network that is no transformer have other names, so none of its matrices is selected:
/// [`GraphTrainOptions::muon`](crate::train::GraphTrainOptions::muon) lists those of your own.
pub fn is_hidden_matrix(name: &str, shape: &Shape) -> bool {
    shape.rank() == 2 && name.ends_with(".weight") && layer_of(name).is_some()
}

/// The layer that a name belongs to: 3 for `h.3.attn.q.weight`, in whatever scope.
pub(crate) fn layer_of(name: &str) -> Option<usize> {
    let mut parts = name.split('.');
    parts.find(|part| *part == "h")?;
    parts.next()?.parse().ok()
}

/// The rows that the parameter of this name and shape has of a whole tensor. `None` if the two do not fit together.
pub(crate) fn rows_of_part(name: &str, shape: &Shape, whole: &Shape) -> Option<Range<usize>> {
    let (table, first) = table_of_part(name);
    let end = first.checked_add(shape.rows())?;
    let fits = match table == name {
        true => whole == shape,
        false => whole.rank() == 2 && whole.cols() == shape.cols() && end <= whole.rows(),
    };
    fits.then_some(first..end)
}
