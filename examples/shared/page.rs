//! Building blocks for the HTML reports of the examples. Each report is one file that loads nothing else.
#![allow(dead_code)] // each example uses a part

use std::fmt::Write;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}\
 table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:left;\
 vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums}pre{background:#f6f6f4;padding:1rem;\
 white-space:pre-wrap}svg{max-width:100%;height:auto}summary{cursor:pointer}figure{margin:1.5rem 0}\
 figcaption{color:#555}";

/// The start of a page, up to and including its heading.
pub fn start(title: &str, heading: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>{}</title>\n<style>{STYLE}</style>\n\
         <h1>{}</h1>\n",
        escape(title),
        escape(heading)
    )
}

pub fn table(page: &mut String, head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> std::fmt::Result {
    let heads: String = head.iter().map(|h| format!("<th>{h}</th>")).collect();
    writeln!(page, "<table><tr>{heads}</tr>")?;
    for row in rows {
        let cells: String = row.iter().map(|c| format!("<td>{}</td>", escape(c))).collect();
        writeln!(page, "<tr>{cells}</tr>")?;
    }
    writeln!(page, "</table>")
}

pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
